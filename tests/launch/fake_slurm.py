"""Slurm's commands as scripts that answer what a test tells them, for the odd answers that a real one gives on a bad day."""

import json
import os
import time
from pathlib import Path

_SCRIPT = """\
#!/bin/bash
cd {folder}
name=$(basename "$0")
echo "$name $*" >> calls
echo "${{SLURM_BITSTR_LEN:-unset}}" >> bitstr
echo "$name ${{SBATCH_ACCOUNT:-unset}}" >> account
case "$name $*" in
  "sbatch --test-only"*) cat >> tested ;;
  sbatch*) if [ -f takes ]; then cat takes; exit 0; fi ;;
esac
[ -f "$name.err" ] && cat "$name.err" >&2
[ -f "$name.out" ] && cat "$name.out"
exit $(cat "$name.rc" 2>/dev/null || echo 0)
"""
_CONFIG = "AccountingStorageType   = accounting_storage/slurmdbd\nMaxArraySize            = 1001\n"


class FakeSlurm:
    """Its scripts lie in `folder`, which belongs first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("sacct", "squeue", "scontrol", "sinfo", "sbatch", "scancel", "srun"):
            (folder / name).write_text(_SCRIPT.format(folder=folder))
            (folder / name).chmod(0o755)
        self.says("scontrol", _CONFIG)
        self.says("sinfo", "low|10:00:00\nhigh|1-00:00:00\nlow*\n")
        (folder / "takes").write_text("Submitted batch job 77\n")

    def says(self, name: str, out: str = "", err: str = "", code: int = 0) -> None:
        for kind, text in (("out", out), ("err", err), ("rc", f"{code}\n")):
            (self.folder / f"{name}.{kind}").write_text(text)

    def says_in_turn(self, name: str, *outs: str) -> None:
        """Have a command print one text after the other; the last one for ever."""
        for place, out in enumerate(outs):
            (self.folder / f"{name}.turn{place:03d}").write_text(out)
        (self.folder / name).write_text(
            f'#!/bin/bash\ncd {self.folder}\necho "{name} $*" >> calls\n'
            f"turns=({name}.turn*)\ncat ${{turns[0]}}\n[ ${{#turns[@]}} -gt 1 ] && rm ${{turns[0]}}\nexit 0\n"
        )

    def refuses(self, text: str) -> None:
        """Have sbatch refuse what is submitted, though it took it when it was tested."""
        (self.folder / "takes").unlink(missing_ok=True)
        (self.folder / "sbatch").write_text(
            f'#!/bin/bash\necho "sbatch $*" >> {self.folder}/calls\n'
            f'[ "$1" = --test-only ] && exit 0\ncat {self.folder}/sbatch.err >&2\nexit 1\n'
        )
        self.says("sbatch", err=text, code=1)

    def accepts(self, job: int) -> None:
        (self.folder / "sbatch").write_text(_SCRIPT.format(folder=self.folder))
        self.says("sbatch")
        (self.folder / "takes").write_text(f"Submitted batch job {job}\n")

    def has_room(
        self, elements: int, otherwise: str = "sbatch: error: AssocMaxSubmitJobLimit (job submit limit)"
    ) -> None:
        """Have sbatch take jobs, from 77 on, while they have no more elements than that together; see `taken`."""
        (self.folder / "room").write_text(f"{elements}\n")
        (self.folder / "scripts").mkdir(exist_ok=True)
        (self.folder / "sbatch").write_text(
            f'#!/bin/bash\ncd {self.folder}\necho "sbatch $*" >> calls\n[ "$1" = --test-only ] && exit 0\n'
            'last=$(sed -n "s/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p" "$1")\n'
            "room=$(( $(cat room) - ${last:-0} - 1 ))\n"
            f'[ $room -lt 0 ] && {{ echo "{otherwise}" >&2; exit 1; }}\necho $room > room\n'
            "job=$(( 77 + $(ls scripts | wc -l) ))\n"
            'cp "$1" scripts/$job\necho "Submitted batch job $job"\n'
        )

    def taken(self) -> dict[str, dict[str, str]]:
        """Return the options of each job that was taken where there was room, by the long names of sbatch."""
        return {
            script.name: {
                option: value.strip("'")
                for line in script.read_text().splitlines()
                if line.startswith("#SBATCH --")
                for option, _, value in [line.removeprefix("#SBATCH --").partition("=")]
            }
            for script in sorted((self.folder / "scripts").iterdir())
        }

    def calls(self, *names: str) -> list[str]:
        """Return what was called since the last time, of these commands."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line for line in lines if not names or line.split()[0] in names]


def age(sweep, seconds: float) -> None:
    """Make the submissions of a sweep older."""
    journal = sweep.path / "launch" / "journal.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    for row in rows:
        row["time"] -= seconds
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))


def running_for(directory, config, *, step: int, silent_s: float = 0.0) -> None:
    """Leave the status of a run that was last heard of so long ago."""
    with directory.lock():
        begun = directory.begin(config, arm="a", content_hash="h", total_steps=6)
    directory.update(begun, step=step)
    raw = json.loads(directory.status_file.read_text())
    directory.status_file.write_text(json.dumps({**raw, "updated": time.time() - silent_s}))
    os.utime(directory.status_file, (time.time() - silent_s,) * 2)
