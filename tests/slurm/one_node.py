"""A Slurm of this machine alone, with the daemons of Debian's slurm-wlm and munge, in a folder of its own.

    python -m tests.slurm.one_node start FOLDER     # prints what to export
    python -m tests.slurm.one_node stop FOLDER

Two partitions share its one node, and jobs of "urgent" preempt those of "batch", which start again afterwards.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
_COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
_SYSTEM = "/usr/sbin:/sbin"
"""Where Debian has the daemons, which is not on the PATH of every user."""
_START_S = 30
_CONFIG = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=3
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 Gres=gpu:1 State=UNKNOWN
PartitionName=batch Nodes={host} Default=YES MaxTime=120 PriorityTier=1 GraceTime=4
PartitionName=urgent Nodes={host} MaxTime=60 PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """What a cluster lacks here, in words; "" if nothing."""
    if os.geteuid() != 0:
        return "needs slurm as root: slurmd starts no jobs otherwise"
    names = [name for name in (*DAEMONS, *_COMMANDS) if _which(name) is None]
    return f"needs slurm: {', '.join(names)} (Debian: slurm-wlm, munge)" if names else ""


def start(folder: Path) -> dict[str, str]:
    """Start it; returns the variables that Slurm's commands need. Raises RuntimeError, with the logs, if it is not up
    within a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool"):
        (folder / name).mkdir(exist_ok=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    names = {"host": host, "user": "root", "folder": folder, "ports": _free_ports(2)}
    (folder / "slurm.conf").write_text(_CONFIG.format(**names))
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/zero\n")
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    environment = {**os.environ, **variables}
    options = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    for command in (
        [_which("munged"), "--force", f"--socket={folder}/munge.socket", *options],
        [_which("slurmctld"), "-c"],
        [_which("slurmd"), "-c", "-N", host],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_START_S)
        if done.returncode:
            stop(folder)
            raise RuntimeError(f"{command}: {done.stderr}")
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        said = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True).stdout
        if said.split() and set(said.split()) == {"idle"}:
            return variables
        time.sleep(0.3)
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(folder.glob("*.log")))
    stop(folder)
    raise RuntimeError(f"Slurm is not up after {_START_S} seconds ({said.split()}):\n{logs}")


def stop(folder: Path) -> None:
    """End its daemons, by their process ids."""
    for name in ("slurmd", "slurmctld", "munge"):
        file = folder / f"{name}.pid"
        if not file.is_file():
            continue
        pid = int(file.read_text())
        for number in (signal.SIGTERM, signal.SIGKILL):
            if _ended(pid, number):
                break


def _ended(pid: int, number: int) -> bool:
    """Whether a process is gone a few seconds after the signal."""
    try:
        os.kill(pid, number)
        for _ in range(50):
            time.sleep(0.1)
            os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_SYSTEM)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    if sys.argv[1:2] == ["start"]:
        if lacking := missing():
            sys.exit(lacking)
        print(*(f"export {name}={value}" for name, value in start(Path(sys.argv[2]).resolve()).items()), sep="\n")
    else:
        stop(Path(sys.argv[2]).resolve())
