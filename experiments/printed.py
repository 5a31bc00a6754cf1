"""What the README's main command and the tour print, recorded for the README and
RESULTS.md.

    python experiments/printed.py [--record experiments/results]

In:    the committed models.
Out:   main.jsonl, tour.jsonl: the text of each, as it is printed here.
Previous: pictures.py. Next: report.py.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
from records import command_line, keep, machine

MODELS = "experiments/models/"
COMMANDS = {"main": ["merge.py", MODELS + "code.safetensors",
                     MODELS + "prose.safetensors"],
            "tour": ["lsmerge.py"]}


def printed(command):
    """Its standard output, run in a folder of its own beside which the repository seems
    to lie."""
    with tempfile.TemporaryDirectory() as folder:
        for path in HERE.parent.iterdir():
            if not path.name.startswith("."):
                (Path(folder) / path.name).symlink_to(path)
        line = [sys.executable, *command]
        return subprocess.run(line, cwd=folder, check=True, capture_output=True,
                              text=True).stdout


def main():
    parser = command_line(__doc__)
    parser.add_argument("--record", type=Path, help="folder of the rows")
    args = parser.parse_args()
    for name, command in COMMANDS.items():
        row = {"name": name, "command": " ".join(["python", *command]),
               "text": printed(command)}
        print(row["text"])
        if args.record:
            keep(args.record / f"{name}.jsonl", [row | machine()])


if __name__ == "__main__":
    main()
