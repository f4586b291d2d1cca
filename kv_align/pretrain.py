"""The recipe of the embedded pair: a tokenizer, a teacher and a student start, trained as plain language models.

`python -m kv_align.pretrain output_dir=DIR` writes `DIR/teacher` and `DIR/student`, each loadable with
`AutoModelForCausalLM.from_pretrained`. `data=gsm8k data.path=...` does the same on real text (its train split only).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_align.runs.program import as_a_command

if TYPE_CHECKING:
    from kv_align.config.config import PretrainConfig


def pretrain(config: PretrainConfig) -> None:
    """Train and write the pair that a configuration asks for."""
    from kv_align.experiment.pretraining import pretrain

    pretrain(config)


def main() -> None:
    """Read the command line, make the pair, and leave."""
    with as_a_command():
        from kv_align.config.cli import pretrain_main

        pretrain_main(pretrain)


if __name__ == "__main__":
    main()
