"""Puts reports of degmix evaluate into one table, with the best scores in bold; prints and writes it.

Reports of different protocols or different data are refused.
"""

import argparse
from pathlib import Path

from ..evaluation.report import check_comparable, format_table, read_report
from ..files import write_whole


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="report.json files, or the directories they are in")
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison.md"), help="Markdown file to write")
    return parser.parse_args()


def main():
    args = parse_args()
    reports = {str(path): read_report(path) for path in args.reports}
    check_comparable(reports)
    table = format_table(list(reports.values()))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.output, lambda file: file.write(table.encode()))
    print(f"{table}\nalso in {args.output}")
