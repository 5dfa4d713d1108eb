"""Markdown that reads well as it is."""

from trimfit.report import markdown


def test_columns_are_aligned_and_numbers_are_to_the_right() -> None:
    lines = markdown(["mask", "perplexity"], [["wanda", "9.5"], ["a|b", "123.25 ± 1"]]).splitlines()
    assert lines == [
        "| mask  | perplexity |",
        "| ----- | ---------: |",
        "| wanda |        9.5 |",
        "| a\\|b  | 123.25 ± 1 |",
    ]


def test_a_table_without_rows() -> None:
    assert markdown(["x"], []) == "| x   |\n| --- |"


def test_a_cell_is_one_line() -> None:
    assert markdown(["x"], [["two\nlines"]]).splitlines()[2] == "| two lines |"
