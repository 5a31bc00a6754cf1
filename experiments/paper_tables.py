"""The paper's tables in miniature, each beside the null controls that say what its numbers mean.

    python experiments/paper_tables.py --table 5 --figure 4 [--quick]             transfer_tables.py
    python experiments/paper_tables.py --table 2 --table 3 --table 4 --table 6    merging_tables.py
    python experiments/paper_tables.py --table 7 --table 8                        codec_tables.py
    python experiments/paper_tables.py --ablation curriculum                      curriculum.py

In:    the models of make_models.py.
Out:   printed tables, and a JSON line per row, appended to results/table2.jsonl and so on.
Paper: Sec. 4 and 5. Left out on purpose: whatever a table is made of; this is only the command.
Previous: curriculum.py. Next: explore_transfer.py.
"""
import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch

import codec_tables
import curriculum
import merging_tables
import transfer_tables
from scores import QUICK, append

MEASURE = {**dict.fromkeys("2346", merging_tables.measure_merging),
           **dict.fromkeys("78", codec_tables.measure_codec)}
PRINT = {**dict.fromkeys("2346", merging_tables.print_merging),
         **dict.fromkeys("78", codec_tables.print_codec)}


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="append", default=[], choices=("5", *MEASURE),
                        help="may be given again")
    parser.add_argument("--figure", action="append", default=[], choices=("4",))
    parser.add_argument("--source", action="append", choices=transfer_tables.PAIRINGS,
                        help="of Table 5 and Figure 4 (all)")
    parser.add_argument("--ablation", choices=("curriculum",),
                        help="which parts of the training earn their place")
    parser.add_argument("--models", type=Path, default=HERE / "models",
                        help="folder of the checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "results",
                        help="folder of the JSON lines, appended to")
    parser.add_argument("--seeds", type=int, default=5, help="for whatever is random (%(default)s)")
    parser.add_argument("--documents", type=int,
                        help="per domain and split, at most; fewer is faster and less sure (all)")
    parser.add_argument("--quick", action="store_true",
                        help=f"{QUICK} documents per domain; nothing is written")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if not (args.table or args.figure or args.ablation):
        parser.error("nothing to do: give --table, --figure or --ablation")
    args.source = args.source or [*transfer_tables.PAIRINGS]
    return args


def main():
    args = parse()
    how = args.seeds, args.documents, args.quick, args.quiet
    for table in dict.fromkeys(args.table):
        if table != "5":
            rows = MEASURE[table](table, args.models, *how)
            PRINT[table](table, rows)
            keep(args, f"table{table}", rows)
    if args.ablation:
        rows = []
        for group in curriculum.measure_ablation(args.models, *how):    # an hour: kept as it comes
            keep(args, "ablation", group)
            rows += group
        curriculum.print_ablation(rows)
    if "5" in args.table or args.figure:
        transfer(args, how)


def transfer(args, how):
    """Table 5 and Figure 4: one grid of cells for both."""
    began = time.perf_counter()
    rows, chosen = transfer_tables.measure_transfer(args.models, *how, args.source)
    if "5" in args.table:
        transfer_tables.print_table5(rows, chosen)
        keep(args, "table5", transfer_tables.of_table5(rows, chosen))
    if args.figure:
        transfer_tables.print_figure4(rows)
        keep(args, "figure4", transfer_tables.of_figure4(rows))
    print(f"\n{len(rows)} models measured in {time.perf_counter() - began:.0f} s "
          f"on {torch.get_num_threads()} threads")


def keep(args, name, rows):
    if not args.quick:
        append(args.results / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
