"""The catalogue: every entry whole, every figure with its reference, its page up to date."""

from pathlib import Path

from temper.cli import main
from temper.data.catalogue import entries, markdown
from temper.data.sources import formats

NAMES = [
    *("FLAN", "Self-Instruct", "Alpaca", "ShareGPT", "LIMA", "Dolly"),
    *("OpenAssistant", "UltraFeedback", "HH", "Tülu", "GSM8K", "PRM800K"),
]


def test_every_entry_is_whole():
    assert list(entries()) == NAMES
    files = {m.__name__.rpartition(".")[2].replace("_", "-") for m in formats().values()}
    for entry in entries().values():
        assert entry.keys() - {"checked"} == {"what", "format", "counts", "made_by", "licence", "hub", "quality", "problems"}
        assert entry["format"] in files
        for number, what, reference in entry["counts"]:
            assert number
            assert what
            assert reference.startswith(("arXiv:", "huggingface.co/", "github.com/", "lmsys.org/"))


def test_the_page_is_what_the_catalogue_says():
    page = Path(__file__).parents[2] / "docs" / "data" / "catalogue.md"
    assert page.read_text(encoding="utf-8") == markdown(), "write it again: temper.data.catalogue.markdown()"


def test_the_command(capsys):
    assert main(["data", "catalogue", "openassistant"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "161,443 messages" in out
    assert "messages are not conversations" in out
    assert main(["data", "catalogue"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in NAMES)
    assert main(["data", "catalogue", "orca"]) == 2
    assert "no data set 'orca' in the catalogue; there are FLAN, " in capsys.readouterr().err
