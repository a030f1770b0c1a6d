"""A name for a Ray job that is unique among all Ray clusters on a machine."""

import re

import ray


def unique_job_id() -> str:
    """Ray's id of this job and the address of its cluster, fit for a file name; equal in every process of the job.

    Every Ray cluster numbers its jobs from 01000000, so two clusters on one machine use the same ids.
    """
    context = ray.get_runtime_context()
    return f"{context.get_job_id()}-{re.sub('[^0-9A-Za-z]+', '-', context.gcs_address)}"
