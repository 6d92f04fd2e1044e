"""`python -m dreamllm_edu.train`: trains the stages of a recipe, on one process or behind a launcher."""
from dreamllm_edu.app.train import leave, main

if __name__ == "__main__":
    leave(main())
