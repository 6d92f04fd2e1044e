"""`python -m dreamllm_edu.train`: trains the stages of a recipe, on one process or behind a launcher."""
from dreamllm_edu.app import train as command
from dreamllm_edu.app.train import leave

run = command.train_stage  # what trains one stage; another function in its place sees what would be trained


def main(argv: list[str] | None = None, prog: str = "python -m dreamllm_edu.train") -> int:
    """As `dreamllm_edu.app.train.main`, with this module's `run`."""
    return command.main(argv, prog, lambda *arguments: run(*arguments))


if __name__ == "__main__":
    leave(main())
