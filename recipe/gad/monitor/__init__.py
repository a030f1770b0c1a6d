"""A run while it trains and afterwards: health rules, the terminal view, the HTML report."""
