"""Why a job of Slurm waits: whether somebody holds it, whether it can never start, or whether it only takes its turn."""

from __future__ import annotations

import re

from launch.executors.base import JobState, Phase

QUIET = ("", "None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit", "Cleaning")
"""Reasons of a job that takes its turn."""
_RESUME = "resume queues it anew"
_RULES: tuple[tuple[str, Phase, str], ...] = (
    # what the reason matches -> phase, and in words why and what to do
    (r"JobHeldUser", "held", "held in Slurm by its owner: scontrol release it, or resume queues it anew"),
    (r"JobHeldAdmin", "held", "held in Slurm by an administrator: ask for its release, or resume queues it anew"),
    (r"launch.failed.requeued.held", "held", f"held in Slurm, since its node could not start it: {_RESUME}"),
    (r"held", "held", "held in Slurm: scontrol release it, or resume queues it anew"),
    (
        r"DependencyNeverSatisfied",
        "blocked",
        f"can never start, since a job that must succeed first did not: {_RESUME}",
    ),
    (
        r"BadConstraints",
        "blocked",
        "can never start, since no node has what it asks for: resume with other values, such as cluster.constraint=null",
    ),
    (
        r"Partition(Time|Node)Limit",
        "blocked",
        "can never start, since its partition allows less than it asks for: resume with less, such as cluster.time_min=60",
    ),
    (
        r"(Assoc|QOS)Max\w*PerJob\w*|(Assoc|QOS)MaxWall\w*|(Assoc|QOS)Min\w*",
        "blocked",
        "can never start, since its account or QOS allows a job less than it asks for: resume with less",
    ),
    (
        r"Invalid(Account|QOS)|(Account|QOS)NotAllowed|ReservationDeleted|InactiveLimit",
        "blocked",
        "can never start with its account, QOS or reservation: resume with others, such as cluster.account=NAME",
    ),
    (r"Dependency", "pending", "waits for the jobs that come before it"),
    (
        r"ReqNodeNotAvail|Node(s)?(Down|NotAvail)|Nodes required|are DOWN|PartitionDown|PartitionInactive|FrontEndDown",
        "pending",
        "waits for nodes that are down, drained or reserved (sinfo shows them)",
    ),
    (r"(Assoc|QOS)\w+", "pending", "waits for a limit of its account or QOS"),
    (r"Reservation", "pending", "waits for its reservation"),
    (r"Licenses", "pending", "waits for licences"),
)


def pending_state(reason: str) -> JobState:
    """Return what a reason of a pending job means; the first rule that fits.

    Parameters
    ----------
    reason
        As `squeue --Format=%r` prints it.
    """
    if reason in QUIET:
        return JobState("pending")
    for pattern, phase, words in _RULES:
        if re.search(pattern, reason, re.IGNORECASE):
            return JobState(phase, f"{words} ({reason})")
    return JobState("pending", reason)
