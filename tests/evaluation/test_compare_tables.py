"""`morsr compare`: tables as others publish them."""

from __future__ import annotations

from pathlib import Path

import pytest

from morsr.cli import main
from morsr.errors import InputError
from morsr.evaluation.comparison import compare_tables, read_groups, read_scores


def table(folder: Path, text: str, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("word", ["Average", "average", "AVG", "Mean"])
def test_a_line_of_averages_is_no_image(tmp_path: Path, word: str) -> None:
    published = table(tmp_path, f"image,psnr,group\na.png,20,x\nb.png,22,x\n{word},21,all\n")
    own = table(tmp_path, f"image,method,psnr,seconds,memory_mb\na,m,21,,\nb,m,23,,\n{word},m,25,,\n", "b.csv")
    assert read_scores(published) == {"a": {"psnr": {"a": 20, "b": 22}}}
    assert set(read_groups(published)) == {"a", "b"}
    assert word in read_scores(own)["m"]["psnr"], "an image of a table that was written here"
    assert compare_tables(published, own).rows[0][3].count == 2
    with pytest.raises(InputError, match="averages only"):
        read_scores(table(tmp_path, f"image,psnr\n{word},21\n"))


def test_suffixes_and_folders_count_where_they_tell_images_apart(tmp_path: Path) -> None:
    def names(images: list[str], more: str = "") -> list[str]:
        text = f"image,psnr{more and ',memory_mb'}\n" + "".join(f"{image},20{more}\n" for image in images)
        return list(read_scores(table(tmp_path, text))["a"]["psnr"])

    assert names(["x/a.png", "x/b.png"]) == ["a", "b"]
    assert names(["x/a.png", "y/a.png", "y/b.png"]) == ["x/a", "y/a", "b"]
    assert names(["a.jpg", "a.png", "b.png"]) == ["a.jpg", "a.png", "b"]
    assert names(["a", "sub/a", "sub/b.png"], ",1") == ["a", "sub/a", "sub/b"], "a table that was written here"


def test_columns_of_text_are_no_metrics(tmp_path: Path) -> None:
    scores = read_scores(table(tmp_path, "image,set,psnr,niqe,\na,RealSR,20,,\nb,DRealSR,21,,\n"))["a"]
    assert scores["psnr"] == {"a": 20, "b": 21}
    assert set(scores) == {"psnr", "niqe"}
    with pytest.raises(InputError, match="line 3: expected a number for beauty, got 'n/a'"):
        read_scores(table(tmp_path, "image,beauty\na,1\nb,n/a\n"))


@pytest.mark.parametrize("columns", ["lpips,lpips_alex", "lpips,lpips", "LPIPS,lpips"])
def test_a_metric_in_two_columns_is_named(tmp_path: Path, columns: str) -> None:
    one, two = columns.split(",")
    with pytest.raises(InputError, match=f"one column per metric, got '{one}' and '{two}', which are both lpips"):
        read_scores(table(tmp_path, f"image,{columns}\na,0.1,0.2\n"))


def test_the_home_folder_may_be_written_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.csv", "b.csv"):
        table(tmp_path, "image,psnr\nx,20\ny,22\n", name)
    assert main(["compare", "~/a.csv", "~/b.csv", "--json=~/out.json"]) == 0
    assert (tmp_path / "out.json").is_file()
