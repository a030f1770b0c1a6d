"""The agent loop's processes, started before stock verl asks for them (recipe/gad/training/start.py)."""

from typing import Any, ClassVar, Optional

from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ


class AgentLoops(AgentLoopManagerTQ):
    """Stock's manager of the processes that ask the rollout engine (``rollout.agent.agent_loop_manager_class``)."""

    _started: ClassVar[Optional["AgentLoops"]] = None

    @classmethod
    def start(cls, **arguments: Any) -> "AgentLoops":
        """Start the processes and return their manager; so does the next :meth:`create`."""
        cls._started = super().create(**arguments)
        return cls._started

    @classmethod
    def create(cls, *args: Any, **arguments: Any) -> "AgentLoops":
        """The manager that has been started, or a new one."""
        started, cls._started = cls._started, None
        return started or super().create(*args, **arguments)
