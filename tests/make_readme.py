"""README.md from nbs/index.ipynb: its text, its visible code, and the pictures that it stores as files.

    python tests/make_readme.py            # write README.md
    python tests/make_readme.py --check    # exit 1 if README.md says something else

`nbdev_readme` does the same where Quarto is installed; this needs nothing."""
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent


def readme():
    """The README's text. Links to notebooks and pictures are rewritten to start at the top of the repository."""
    parts, runs_on = [], False  # runs_on: the last part is code, and code that follows belongs to the same block
    for cell in nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code" and "#| echo: false" not in cell.source:
            if runs_on:
                parts[-1] = parts[-1].removesuffix("```") + f"\n{cell.source}\n```"
            else:
                parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                parts.append(output["data"]["text/markdown"])
        runs_on = bool(parts) and parts[-1].startswith("```python")
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    text = re.sub(r"\]\((?=[\w-]+\.ipynb|images/)", "](nbs/", text)
    return re.sub(r'((?:src|srcset)=")(?=images/)', r"\1nbs/", text)


if __name__ == "__main__":
    if "--check" in sys.argv:
        same = (ROOT / "README.md").read_text(encoding="utf8") == readme()
        sys.exit(0 if same else "README.md and nbs/index.ipynb differ: run python tests/make_readme.py")
    (ROOT / "README.md").write_text(readme(), encoding="utf8")
