"""`python -m dreamllm_edu.train`: trains the stages of a recipe, on one process or behind a launcher."""
from dreamllm_edu._moved import divided
from dreamllm_edu.app.train import leave, main

__getattr__ = divided("dreamllm_edu.train")

if __name__ == "__main__":
    leave(main())
