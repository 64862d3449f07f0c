"""Train a TransNormer, from a configuration to a final checkpoint that transformers opens.

accelerate launch train.py --config configs/quickstart.yaml --out runs/quickstart
"""

import sys

from training.config import Run, load_config
from training.errors import ConfigError
from training.imports import import_modules
from training.outcome import Ending, StopSignal, exit_code_of
from training.progress import working


def train(run: Run, ending: Ending) -> None:
    """The whole run; every step is a method of the trainer."""
    stop, ending.asked = StopSignal(), run.out
    with stop.listening():
        with working("loading torch, transformers and accelerate"):
            from training.trainer import Trainer

            import_modules(run.imports)
        trainer = Trainer(run, stop)  # refuses what can't work before anything is written
        with trainer.watched(ending):
            trainer.prepare_data()
            trainer.build_model()
            with trainer.opened():  # makes the folder, or goes on from a checkpoint
                if trainer.evaluation_due():  # of the step of the checkpoint, which a signal or a kill left out
                    trainer.evaluate()
                while trainer.step < run.config.training.steps:
                    trainer.train_step()
                    if trainer.checkpoint_due():
                        trainer.save()
                    if trainer.evaluation_due():
                        trainer.evaluate()
                    trainer.stop_if_asked()
                trainer.finish()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code that `training/errors.py` lists."""
    try:
        run = load_config(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return exit_code_of(lambda ending: train(run, ending))


if __name__ == "__main__":
    sys.exit(main())
