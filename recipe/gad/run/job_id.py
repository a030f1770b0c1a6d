"""What tells one Ray cluster from another on the same machine."""

import re

import ray


def unique_job_id() -> str:
    """Ray's id of this job with the address of its cluster, as part of a file name; equal in every process of the job.

    Every Ray cluster numbers its jobs from 01000000, so the id alone is the same for two clusters on one machine.
    """
    context = ray.get_runtime_context()
    return f"{context.get_job_id()}-{re.sub('[^0-9A-Za-z]+', '-', context.gcs_address)}"
