"""Execute notebooks from top to bottom, two at a time, each in a fresh kernel; any error or more than 600 s fails.

    python .ci/notebooks.py                             all of notebooks/, results thrown away
    python .ci/notebooks.py --save notebooks/06*.ipynb  store the outputs, cells numbered 1..n, as they are committed
"""

import argparse
import asyncio
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds for a whole notebook
AT_A_TIME = 2


async def execute(path: Path) -> tuple[nbformat.NotebookNode, str | None]:
    """→ the notebook with new outputs, and what went wrong, if anything did."""
    notebook = nbformat.read(path, as_version=4)
    # "python3" is the environment this script runs in; the folder is the notebook's own, as when a person opens it
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", extra_arguments=["--log-level=CRITICAL"],
                            resources={"metadata": {"path": path.parent}})
    began = time.monotonic()
    try:
        await asyncio.wait_for(client.async_execute(), LIMIT)
    except CellExecutionError as error:
        return notebook, str(error)
    except (DeadKernelError, asyncio.TimeoutError):  # nbclient may answer a time-out with either
        late = time.monotonic() - began >= LIMIT
        return notebook, f"not done after {LIMIT} s" if late else "the kernel died"
    return notebook, None


def strip_metadata(notebook: nbformat.NotebookNode) -> None:
    """Drop what changes with every execution and says nothing: times, versions, widget states."""
    notebook.metadata = nbformat.from_dict({"kernelspec": {"display_name": "Python 3", "language": "python",
                                                           "name": "python3"}, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)


async def run(path: Path, save: bool, free: asyncio.Semaphore) -> bool:
    """Execute one notebook when there is room for it, and say how it went."""
    async with free:
        began = time.monotonic()
        notebook, error = await execute(path.resolve())
        print(f"{'BROKEN' if error else 'ran'}  {path.name}  {time.monotonic() - began:.0f} s", flush=True)
    if error:
        print(error, file=sys.stderr, flush=True)
    elif save:
        strip_metadata(notebook)
        nbformat.write(notebook, path)
    return error is None


async def run_all(paths: list[Path], save: bool) -> list[bool]:
    free = asyncio.Semaphore(AT_A_TIME)
    return await asyncio.gather(*(run(path, save, free) for path in paths))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: notebooks/*.ipynb")
    parser.add_argument("--save", action="store_true", help="write the outputs into the notebooks")
    args = parser.parse_args()
    paths = args.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    broken = [path.name for path, ran in zip(paths, asyncio.run(run_all(paths, args.save))) if not ran]
    print(f"{len(paths) - len(broken)} of {len(paths)} notebooks ran", *(["; broken:"] + broken if broken else []))
    return 1 if broken or not paths else 0  # an empty folder proves nothing


if __name__ == "__main__":
    sys.exit(main())
