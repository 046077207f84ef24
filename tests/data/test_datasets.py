"""Case lists: what is read, what is refused, and the words it is refused with."""

import os
import pathlib

import pytest

from deepsc_jax.data import datasets
from deepsc_jax.runtime.errors import InputError

HEADER = ",".join(datasets.COLUMNS)


@pytest.fixture
def case_list(tmp_path):
    """A function that writes a case list of the given lines, and the files that they name."""

    def write(*lines: str, encoding: str = "utf-8", make_files: bool = True) -> pathlib.Path:
        path = tmp_path / "cases.csv"
        path.write_text("\n".join((HEADER, *lines)) + "\n", encoding=encoding)
        if make_files:
            for line in lines:
                for name in line.split(",")[4:]:
                    if name:
                        (tmp_path / name).touch()
        return path

    return write


def test_reads_paths_relative_to_the_list_and_masks_that_are_absent(case_list, tmp_path):
    path = case_list("a,p1,train,covid-19,a.nii.gz,al.nii.gz,", "b,p2,test,cap,b.nii.gz,,bl.nii.gz")
    a, b = datasets.read_cases(path)
    assert a == datasets.Case(
        "a", "p1", "train", 0, tmp_path / "a.nii.gz", tmp_path / "al.nii.gz", None
    )
    assert (b.label, b.lesion_mask, b.lung_mask) == (1, None, tmp_path / "bl.nii.gz")


def test_reads_what_spreadsheets_write(case_list):
    path = case_list("a, p1, train ,cap,a.nii.gz,,", "", ",,,,,,", encoding="utf-8-sig")
    assert [(c.patient, c.split) for c in datasets.read_cases(path)] == [("p1", "train")]


def test_written_lists_read_back_and_stay_right_when_moved(case_list, tmp_path):
    inside = datasets.read_cases(case_list("a,p1,train,covid-19,a.nii.gz,al.nii.gz,"))
    elsewhere = datasets.Case("b", "p2", "test", 2, pathlib.Path("/elsewhere/b.nii.gz"))
    datasets.write_cases([*inside, elsewhere], tmp_path / "written.csv")
    assert datasets.read_cases(tmp_path / "written.csv", check_files=False) == [*inside, elsewhere]
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "written.csv").rename(moved / "written.csv")
    read = datasets.read_cases(moved / "written.csv", check_files=False)
    assert [case.scan for case in read] == [moved / "a.nii.gz", elsewhere.scan]


LINES = [
    ", Case,PATIENT ,split,Label, scan,lesion mask,lung-mask,remarks",
    '1,a,p1,train,cap,"a,b.nii.gz",,,"two\nlines"',
    "",
    "2, b , p2 ,test,covid-19,c.nii.gz,m.nii.gz,,",
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_reads_lists_of_any_separator_encoding_and_line_end(tmp_path, separator, encoding, end):
    swapped = [line.translate(str.maketrans({",": separator})) for line in LINES]
    text = end.join(swapped).replace(f"a{separator}b", "a,b")
    (tmp_path / "cases.csv").write_bytes(text.encode(encoding))
    a, b = datasets.read_cases(tmp_path / "cases.csv", check_files=False)
    assert a == datasets.Case("a", "p1", "train", 1, tmp_path / "a,b.nii.gz")
    assert b == datasets.Case("b", "p2", "test", 0, tmp_path / "c.nii.gz", tmp_path / "m.nii.gz")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_names_may_be_of_any_script(case_list, encoding, tmp_path):
    composed, decomposed = "J\u00f6rg_\u80ba.2", "Jo\u0308rg_\u80ba.2"
    path = case_list(f"{decomposed},患者,train,cap,扫描 é.nii.gz,,", encoding=encoding)
    (tmp_path / "扫描 é.nii.gz").touch()
    (case,) = datasets.read_cases(path)
    assert (case.name, case.patient) == (composed, "患者")
    assert case.scan == tmp_path / "扫描 é.nii.gz"
    datasets.write_cases([case], tmp_path / "written.csv")
    assert datasets.read_cases(tmp_path / "written.csv") == [case]


def test_latin_1_lists_name_files_by_either_encoding_and_say_so(tmp_path, capsys):
    (tmp_path / "Müller.nii").touch()
    raw = os.fsdecode(os.fsencode(tmp_path) + "/Größe.nii".encode("latin-1"))
    pathlib.Path(raw).touch()
    lines = [HEADER, "a,Jörg,train,cap,Müller.nii,,", "b,p2,train,cap,Größe.nii,,"]
    (tmp_path / "cases.csv").write_bytes("\n".join(lines).encode("latin-1"))
    a, b = datasets.read_cases(tmp_path / "cases.csv")
    assert (a.patient, a.scan, str(b.scan)) == ("Jörg", tmp_path / "Müller.nii", raw)
    assert "not UTF-8, so read as cp1252" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(case_list, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (case,) = datasets.read_cases(case_list("a,p,train,cap,~/a.nii,,", make_files=False), (), False)
    assert case.scan == tmp_path / "home/a.nii"


def test_what_spreadsheets_put_before_the_first_line_is_no_column(tmp_path):
    path, line = tmp_path / "cases.csv", "a,p1,train,cap,a.nii.gz,,"
    text = f"{HEADER}\n{line}\nb,p2,train,flu,b.nii.gz,,\n".replace(",", ";")
    for before in ("sep=;\n", "\ufeff\ufeff"):
        path.write_text(before + text, encoding="utf-8")
        failures: list[str] = []
        (case,) = datasets.read_cases(path, check_files=False, failures=failures)
        assert case.name == "a"
        assert f"line {3 + before.count(chr(10))}: b: label 'flu'" in failures[0]


def test_a_quote_that_nothing_closes_takes_in_no_case(case_list):
    path = case_list('a,"p1,train,cap,a.nii,,', "b,p2,train,cap,b.nii,,", make_files=False)
    with pytest.raises(InputError, match=r"not a CSV text file .unexpected end of data"):
        datasets.read_cases(path)


def test_what_is_too_large_for_a_list_is_not_read(tmp_path):
    with (tmp_path / "scan.nii").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="1099511627776 bytes, expected a case list of at most"):
        datasets.read_cases(tmp_path / "scan.nii")


def test_a_scan_that_stands_twice_is_named_by_whatever_path(case_list, tmp_path):
    path = case_list("a,p1,train,cap,a.nii.gz,,", "b,p1,train,cap,link.nii.gz,,")
    (tmp_path / "link.nii.gz").unlink()
    (tmp_path / "link.nii.gz").symlink_to("a.nii.gz")
    with pytest.raises(InputError, match=r"case b \(train\) has the scan of case a .*--exclude=b"):
        datasets.read_cases(path)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a,p1,train,influenza,a.nii.gz,,"], ["line 2", "'influenza'", "covid-19, cap"]),
        (["a,p1,holdout,cap,a.nii.gz,,"], ["'holdout'", "train, validation, test"]),
        (["a,p1,train,cap,a.nii.gz,,", "A,p1,train,cap,b.nii.gz,,"], ["2 lines", "rename"]),
        (["a,p1,train,cap,a.nii.gz,,", "b,p1,test,cap,b.nii.gz,,"], ["patient p1", "train", "b"]),
        (["../a,p1,train,cap,a.nii.gz,,"], ["'../a'", "letters"]),
        ([",p1,train,cap,a.nii.gz,,"], ["''", "rename"]),
        (["a,p1,train,cap,a.nii.gz,,", "b,P1,test,cap,b.nii.gz,,"], ["patient P1", "train", "b"]),
        (["a,p1,train,cap,a.nii.gz,,", "b,p2,test,cap,a.nii.gz,,"], ["scan of case a", "test"]),
        (["a,p1,Train,cap,a.nii.gz,,"], ["line 2", "'Train'", "train, validation, test"]),
        (["a,p1,train,COVID,a.nii.gz,,"], ["line 2", "'COVID'", "covid-19, cap"]),
        (["a,p1,train,cap,,,,b.nii.gz"], ["line 2", "'b.nii.gz'", "quotes"]),
        ([f"{'肺' * 100},p1,train,cap,a.nii.gz,,"], ["line 2", "200 bytes"]),
        (["a,,train,cap,a.nii.gz,,"], ["patient is empty"]),
        (["a,p1,train,cap,,,"], ["scan is empty"]),
        ([], ["no cases"]),
    ],
)
def test_refuses_a_bad_line_in_one_line_of_its_own(case_list, lines, words):
    with pytest.raises(InputError) as caught:
        datasets.read_cases(case_list(*lines))
    message = str(caught.value)
    assert "cases.csv" in message
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_bad_lines_are_gathered_where_the_others_are_wanted(case_list):
    path = case_list("a,p1,train,cap,a.nii.gz,,", "b,p2,train,influenza,b.nii.gz,,")
    failures: list[str] = []
    assert [case.name for case in datasets.read_cases(path, failures=failures)] == ["a"]
    (line,) = failures
    assert "line 3: b: label 'influenza' is unknown, expected one of" in line
    assert line.endswith("mend it, or drop the case with --exclude=b")
    assert [case.name for case in datasets.read_cases(path, exclude=["b"])] == ["a"]


def test_refuses_missing_files_unless_told_not_to_look(case_list):
    path = case_list("a,p1,train,cap,a.nii.gz,m.nii.gz,", make_files=False)
    with pytest.raises(InputError, match=r"a: .*a\.nii\.gz does not exist.*--exclude=a.*1 more"):
        datasets.read_cases(path)
    assert len(datasets.read_cases(path, check_files=False)) == 1


def test_excluded_cases_are_left_out_and_must_exist(case_list):
    path = case_list("a,p1,train,cap,a.nii.gz,,", "b,p1,test,cap,b.nii.gz,,")
    assert [case.name for case in datasets.read_cases(path, exclude=["b"])] == ["a"]
    with pytest.raises(InputError, match="--exclude=c: no such case"):
        datasets.read_cases(path, exclude=["c"])


def test_refuses_files_that_are_no_case_list(tmp_path):
    with pytest.raises(InputError, match="no such case list"):
        datasets.read_cases(tmp_path / "absent.csv")
    (tmp_path / "a.csv").write_text("case,scan\na,a.nii.gz\n")
    with pytest.raises(InputError, match="no column patient, split, label, lesion_mask, lung_mask"):
        datasets.read_cases(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text(f"{HEADER},Scan\n")
    with pytest.raises(InputError, match="two columns scan"):
        datasets.read_cases(tmp_path / "a.csv")
    for content in (b"\xff\xfe\x00case", b"\x81\x8d\x8f", bytes(1000), b"", b"PK\x03\x04\0\0"):
        (tmp_path / "b.csv").write_bytes(content)
        with pytest.raises(InputError, match=r"save it as UTF-8|no column case"):
            datasets.read_cases(tmp_path / "b.csv")


def test_indicators_are_columns_in_any_place_and_others_are_not_read(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text(
        f"CRP,age,{HEADER},White Cells\n"
        "5.5,old,a,p1,train,cap,a.nii.gz,,,7\n"
        "1e2,,b,p2,train,cap,b.nii.gz,,,-0.5\n"
    )
    names = ("white_cells", "crp")
    cases = datasets.read_cases(path, check_files=False, indicators=names)
    assert [case.targets for case in cases] == [(7.0, 5.5), (-0.5, 100.0)]
    datasets.write_cases(cases, tmp_path / "written.csv", indicators=names)
    again = datasets.read_cases(tmp_path / "written.csv", check_files=False, indicators=names)
    assert again == cases
    assert datasets.read_cases(path, check_files=False)[0].targets == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a: crp is empty: fill it in, or drop the case with --exclude=a"),
        ("high", "a: crp is 'high', a number such as 5.1 is expected: fill it in"),
        ('"5,1"', "a: crp is '5,1', a number such as 5.1 is expected"),
        ("nan", "a: crp is 'nan', a number"),
        ("inf", "a: crp is 'inf', a number"),
    ],
)
def test_an_indicator_that_is_missing_or_no_number_is_one_line(tmp_path, text, said):
    path = tmp_path / "cases.csv"
    path.write_text(f"{HEADER},crp\na,p1,train,cap,a.nii.gz,,,{text}\n")
    with pytest.raises(InputError, match=f"line 2: {said}"):
        datasets.read_cases(path, check_files=False, indicators=("crp",))
    failures: list[str] = []
    assert not datasets.read_cases(path, check_files=False, failures=failures, indicators=("crp",))
    assert len(failures) == 1
    with pytest.raises(InputError, match="no column pct in its first line; expected case,"):
        datasets.read_cases(path, check_files=False, indicators=("pct",))
