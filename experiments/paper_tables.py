"""The paper's tables in miniature, each beside the null controls that say what its
numbers mean.

    python experiments/paper_tables.py --figure 4 [--quick]     # transfer_tables.py
    python experiments/paper_tables.py --table 2 --table 3      # merging_tables.py
    python experiments/paper_tables.py --table 4 --table 6
    python experiments/paper_tables.py --table 7 --table 8      # codec_tables.py
    python experiments/paper_tables.py --ablation curriculum    # curriculum.py

In:    the models of make_models.py.
Out:   the sections of RESULTS.md that were measured, printed; their rows, kept in
       results/. Figure 4 is Table 5 as well.
Paper: Sec. 4 and 5. Left out on purpose: whatever a table is made of; this is only the
       command.
Previous: curriculum.py. Next: sections.py.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "tools")]
import codec_tables
import curriculum
import merging_tables
import sections
import transfer_tables
from records import Results, command_line, keep
from scores import QUICK

MEASURE = {**dict.fromkeys("2346", merging_tables.measure_merging),
           **dict.fromkeys("78", codec_tables.measure_codec)}
SHOW = {"2": sections.table2, "3": sections.table3, "4": sections.table4,
        "6": sections.table6,
        "7": sections.table7, "8": sections.table8}


def parse():
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--table", action="append", default=[], choices=MEASURE,
        help="may be given again")
    add("--figure", action="append", default=[], choices=("4",), help="and Table 5")
    add("--source", action="append", choices=transfer_tables.PAIRINGS,
        help="of Figure 4 (all)")
    add("--ablation", choices=("curriculum",), help="of the training")
    add("--models", type=Path, default=HERE / "models",
        help="folder of the checkpoints")
    add("--results", type=Path, default=HERE / "results", help="folder of the rows")
    add("--seeds", type=int, default=5, help="for whatever is random (%(default)s)")
    add("--documents", type=int,
        help="per domain and split, at most; fewer is faster and less "
        "sure (all)")
    add("--quick", action="store_true",
        help=f"{QUICK} documents per domain; nothing is written")
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if not (args.table or args.figure or args.ablation):
        parser.error("nothing to do: give --table, --figure or --ablation")
    return args


def main():
    args = parse()
    how = (args.seeds, args.documents, args.quick, args.quiet)

    def show(name, rows, *views):
        if not args.quick:
            keep(args.results / f"{name}.jsonl", rows)
        for view in views:
            sections.show(view, Results(given={name: rows}))

    for table in dict.fromkeys(args.table):
        show(f"table{table}", MEASURE[table](table, args.models, *how), SHOW[table])
    if args.ablation:
        # kept as they come
        for rows in curriculum.measure_ablation(args.models, *how):
            show("ablation", rows, sections.ablation)
    if args.figure:
        names = args.source or transfer_tables.PAIRINGS
        rows = transfer_tables.measure_transfer(args.models, *how, names)
        show("figure4", rows, sections.table5, sections.figure4)


if __name__ == "__main__":
    main()
