"""`python -m dreamllm_edu`: the command line."""
import sys

from dreamllm_edu.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
