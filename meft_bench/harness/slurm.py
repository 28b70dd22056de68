"""What Slurm says of its partitions and of this user's jobs, by its own commands. No torch and no submitit here."""

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from meft_bench.fields import one_line

_COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol")
_ANSWER_S = 60


@dataclass(frozen=True)
class Queued:
    """A job that Slurm has not done with: its state ("PENDING", "RUNNING", ...), the node or the reason why it waits
    in brackets, and the time it has run."""

    state: str
    where: str
    elapsed: str


def check_here() -> None:
    """Raises ValueError unless Slurm's commands are on this machine's PATH."""
    if missing := [name for name in _COMMANDS if shutil.which(name) is None]:
        raise ValueError(
            f"--cluster slurm needs Slurm's commands, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "not on the PATH: give the command on a login node of the cluster, or --cluster local"
        )


def longest_minutes(partition: str | None) -> int | None:
    """The time limit of a partition (of several, with commas between: the shortest); None where it has none. partition
    None is Slurm's default one. Raises ValueError for one that is not there and when Slurm does not answer."""
    limits = {}
    for line in _answer("sinfo", "--noheader", "--format=%P|%l").splitlines():
        name, _, limit = line.strip().partition("|")
        limits[name] = limit
    default = {name.rstrip("*") for name in limits if name.endswith("*")}
    limits = {name.rstrip("*"): limit for name, limit in limits.items()}
    asked = set(partition.split(",")) if partition is not None else default
    known = ", ".join(sorted(limits)) or "none"
    if not asked:
        raise ValueError(f"Slurm has no default partition here: give --partition (known: {known})")
    if unknown := sorted(asked - set(limits)):
        raise ValueError(f"unknown partition {', '.join(unknown)}; known: {known}")
    minutes = [found for name in asked if (found := _minutes(limits[name])) is not None]
    return min(minutes, default=None)


def _minutes(limit: str) -> int | None:
    """ "2-12:00:00", "30:00" or "infinite" as minutes."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if found is None:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes


def queue() -> dict[str, Queued]:
    """Job id ("4711_3" in an array) -> what Slurm says, for all jobs of this user that are not over."""
    said = _answer("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T|%R|%M")
    found = {}
    for line in said.splitlines():
        job, state, where, elapsed = (line.strip().split("|", 3) + [""] * 3)[:4]
        found[job] = Queued(state, where, elapsed)
    return found


def ended(jobs: Iterable[str]) -> dict[str, str]:
    """Job id -> how it ended ("TIMEOUT", "OUT_OF_MEMORY", ...), of those that Slurm's accounting remembers; empty where
    the cluster keeps no accounts."""
    names = sorted(set(jobs))
    if not names or shutil.which("sacct") is None:
        return {}
    try:
        said = _answer("sacct", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(names)}")
    except ValueError:
        return {}
    pairs = [line.split("|", 1) for line in said.splitlines() if "|" in line]
    return {job: state.split(" ")[0] for job, state in pairs if job in set(names)}


def _answer(*command: str) -> str:
    """What a command prints. Raises ValueError, with its own words, when it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, errors="replace")
    except subprocess.TimeoutExpired:
        raise ValueError(f"Slurm does not answer ({command[0]}, {_ANSWER_S} seconds): is its controller up?") from None
    except OSError as error:
        raise ValueError(f"cannot run {command[0]} ({error.strerror})") from None
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {one_line(done.stderr)}")
    return done.stdout
