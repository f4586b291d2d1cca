"""A real Slurm of two nodes with two pretend GPUs each, on this machine, without systemd and without touching another one.

Everything listens on the loopback and lives in one temporary folder; only processes that were started here are ended.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

PATIENCE = float(os.environ.get("KV_ALIGN_PATIENCE", "1"))  # factor on every time limit, for a busy machine
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mysqld", "mysql_install_db")

SLURM_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
ReturnToService=2
SlurmctldPidFile={dir}/ctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/ctld.log
SlurmdLogFile={dir}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
MpiDefault=none
KillWait=5
SlurmdTimeout=10
JobRequeue=1
MaxArraySize={max_array}
SchedulerParameters=bf_interval=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={db_port}
AccountingStoragePass={dir}/munge.sock
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_port}-{node_port_2}] CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 MaxTime=600
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

DBD_CONF = """\
AuthType=auth/munge
AuthInfo={dir}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={db_port}
SlurmUser=root
LogFile={dir}/dbd.log
PidFile={dir}/dbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
"""


class RealSlurm:
    """Started by `start`, ended by `stop`; `environment` is what a client needs."""

    def __init__(self, max_array: int = 1001) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="kvslurm-", dir="/tmp"))
        ports = [_free_port() for _ in range(2)]
        node = _free_ports_in_a_row(2)
        values = {
            "dir": self.dir,
            "host": socket.gethostname().partition(".")[0],
            "port": ports[0],
            "db_port": ports[1],
            "node_port": node,
            "node_port_2": node + 1,
            "max_array": max_array,
        }
        self.conf = self.dir / "slurm.conf"
        self.conf.write_text(SLURM_CONF.format(**values))
        (self.dir / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-2] Name=gpu File={self.dir}/dev/nvidia[0-1]\n"
        )
        (self.dir / "slurmdbd.conf").write_text(DBD_CONF.format(**values))
        (self.dir / "slurmdbd.conf").chmod(0o600)
        (self.dir / "dev").mkdir()
        for index in range(2):  # regular files would leave CUDA_VISIBLE_DEVICES empty
            subprocess.run(["mknod", f"{self.dir}/dev/nvidia{index}", "c", "1", "3"], check=True)
        for name in ("state", "spool", "db"):
            (self.dir / name).mkdir()
        self.environment = dict(os.environ, SLURM_CONF=str(self.conf), MYSQL_UNIX_PORT=f"{self.dir}/mysql.sock")
        self.processes: dict[str, subprocess.Popen] = {}
        self._commands: dict[str, tuple[str, ...]] = {}
        self._lock, self._stopped = threading.RLock(), threading.Event()

    def start(self) -> None:
        key = self.dir / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self._spawn("munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.dir}/munge.sock",
                    f"--pid-file={self.dir}/munged.pid", f"--log-file={self.dir}/munged.log",
                    f"--seed-file={self.dir}/munged.seed")  # fmt: skip
        self._start_database()
        self.start_accounting()
        self._add("cluster", "local")
        self._add("account", "mine")
        self._add("user", "root", "account=mine", "defaultaccount=mine")
        self.start_controller("-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.until("both nodes are idle", lambda: self.out("sinfo", "-h", "-N", "-o", "%T").split()[:2] == ["idle"] * 2)

    def start_accounting(self) -> None:
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self.until("slurmdbd answers", lambda: self.call("sacctmgr", "-n", "show", "cluster").returncode == 0)

    def _add(self, kind: str, name: str, *more: str) -> None:
        def there() -> bool:
            self.call("sacctmgr", "-i", "add", kind, name, *more)
            return name in self.out("sacctmgr", "-n", "-P", "show", kind, f"format={kind}").split()

        self.until(f"accounting knows the {kind} {name}", there)

    def _start_database(self) -> None:
        data = self.dir / "db"
        install = ["mysql_install_db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db"]

        def installed() -> bool:
            shutil.rmtree(data)
            data.mkdir()
            done = self.call(*install, "--auth-root-authentication-method=normal")
            (self.dir / "mysql_install_db.out").write_text(done.stdout + done.stderr)
            return done.returncode == 0

        self.until("the database is installed", installed)
        self._spawn("mysqld", "mysqld", "--no-defaults", f"--datadir={data}", f"--socket={self.dir}/mysql.sock",
                    "--skip-networking", "--user=root", f"--pid-file={self.dir}/mysqld.pid",
                    "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0")  # fmt: skip
        self.until("the database answers", lambda: (self.dir / "mysql.sock").exists())
        # MariaDB 10.11.19 crashes once in a while, and takes slurmdbd with it where that is just starting.
        threading.Thread(target=self._keep_alive, args=("mysqld", "slurmdbd"), daemon=True).start()

    def _keep_alive(self, *names: str) -> None:
        """Start again what ended though nobody ended it: that has no entry in `processes` any more."""
        while not self._stopped.wait(0.3):
            for name in names:
                with self._lock:
                    process = self.processes.get(name)
                    if process is not None and process.poll() is not None:
                        self._spawn(name, *self._commands[name])

    def start_controller(self, *options: str) -> None:
        self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.conf), *options)
        self.until("the controller answers", lambda: "UP" in self.out("scontrol", "ping"))

    def start_node(self, node: str) -> None:
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        with self._lock:
            process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(timeout=60)

    def restart_controller(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it and start it; killed, it forgets what it has not written to disk, jobs of the last seconds among them."""
        self.kill("slurmctld", number)
        self.start_controller()

    def enforce(self, what: str) -> None:
        """Have the controller enforce associations and limits (`limits`), or nothing."""
        lines = [line for line in self.conf.read_text().splitlines() if not line.startswith("AccountingStorageEnforce")]
        self.conf.write_text("\n".join([*lines, *([f"AccountingStorageEnforce={what}"] if what else [])]) + "\n")
        self.restart_controller()
        # What Slurm queued again just before its run ended starts two minutes later, and passes over it.
        self.settle(240.0)

    def settle(self, timeout_s: float = 60.0) -> None:
        """Wait until no job is left and both nodes can take one."""
        for node in ("n1", "n2"):
            if node not in self.processes:
                self.start_node(node)
        self.call("scontrol", "update", "nodename=n1,n2", "state=resume")  # says no where nothing is wrong
        self.until("no job is left", lambda: not self.out("squeue", "-h").strip(), timeout_s)
        self.until(
            "both nodes are idle",
            lambda: self.out("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2,
        )

    def accounted(self, job: str) -> set[str]:
        """State and exit code of a job, or of an array's elements; waits until accounting has heard of their end."""
        ask = ("sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job)

        def told() -> set[str]:
            return set(self.out(*ask).split("\n")) - {""}

        def heard() -> bool:
            return bool(told()) and not any(each.startswith(("RUNNING", "PENDING", "REQUEUED")) for each in told())

        self.until(f"accounting has heard of the end of {job}", heard)
        return told()

    def preempt(self, job: str) -> str:
        """Take the resources of a running job for one of the partition that goes first; returns its id."""
        node = self.out("squeue", "-h", "-j", job, "-o", "%N").strip()
        told = self.out("sbatch", "--parsable", "--partition=high", f"--nodelist={node}", "--exclusive", "--mem=0",
                        "--output=/dev/null", "--time=5", "--wrap", "sleep 2")  # fmt: skip
        return told.strip()

    def ask_to_leave(self, job: str) -> None:
        """Send the signal that comes before a time limit."""
        command = ("scancel", "--signal=USR2", job)
        # While a job changes its state, scancel goes on trying for more than a minute, though the signal has arrived.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=self.environment, capture_output=True, check=True, timeout=4)

    def kill_node_of(self, job: str) -> str | None:
        """Let a node die with all that it does for a job: its slurmd, the job's step daemons, and what they started."""
        told = self.out("squeue", "-h", "-j", job, "-t", "running", "-o", "%N %A").split()
        if len(told) != 2:
            return None
        node, raw = told
        self.kill(node)
        mine = f"SLURM_JOB_ID={raw}\0".encode()
        for _ in range(2):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    daemon = (folder / "cmdline").read_bytes().startswith(f"slurmstepd: [{raw}.".encode())
                    if daemon or mine in (folder / "environ").read_bytes():
                        os.kill(int(folder.name), signal.SIGKILL)
                except OSError:
                    continue
        return node

    def call(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)

    def out(self, *command: str) -> str:
        return self.call(*command).stdout

    def stop(self) -> None:
        self.call("scancel", "--user=root")
        time.sleep(1)
        self._stopped.set()
        with self._lock:
            pass  # whatever is being started again is in `processes` now
        for name in reversed(list(self.processes)):
            process = self.processes.pop(name)
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def _spawn(self, name: str, *command: str) -> None:
        self._commands[name] = command
        with self._lock, (self.dir / f"{name}.out").open("ab") as log:
            # If the tests themselves are killed, their daemons go with them.
            self.processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def until(self, what: str, condition, timeout_s: float = 60.0) -> None:
        """Wait for a condition; what the daemons printed comes with the complaint when it takes too long."""
        deadline = time.monotonic() + PATIENCE * timeout_s
        while not condition():
            if time.monotonic() > deadline:
                tails = {file.name: file.read_text(errors="replace")[-800:] for file in self.dir.glob("*.out")}
                jobs = self.out("squeue", "-h", "-r", "-o", "%i %T %r %j %E")
                raise TimeoutError(f"{what}: not within {timeout_s:.0f} s; jobs: {jobs}; {tails}")
            time.sleep(0.1)


def missing() -> list[str]:
    """Return the programs that are not here."""
    search = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in NEEDED if shutil.which(name, path=search) is None]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _free_ports_in_a_row(count: int) -> int:
    # Anywhere in the range: two clusters that start at the same moment would find the same ones free.
    for start in sorted(range(27821, 32000, count), key=lambda start: secrets.randbits(32)):
        try:
            for port in range(start, start + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return start
        except OSError:
            continue
    raise OSError("no free ports")
