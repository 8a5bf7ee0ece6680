from __future__ import annotations

import logging

import pytest

from megatron_qwenvl.engine import versions


def test_each_python_has_its_tested_version() -> None:
    assert versions.tested_version((3, 11)) == "0.16.1"
    assert versions.tested_version((3, 12)) == "0.19.2"
    assert versions.tested_version((3, 13)) == "0.19.2"


def test_the_installed_version_is_the_tested_one(caplog: pytest.LogCaptureFixture) -> None:
    for on_gpu in (False, True):
        versions.check_version(on_gpu)
    assert not caplog.records


def test_an_untested_version_is_refused_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.17.0")
    expected = (
        rf"megatron-core {versions.tested_version()} is tested with Python 3\.\d+, found 0\.17\.0: install"
    )
    with pytest.raises(versions.EngineVersionError, match=expected):
        versions.check_version(on_gpu=False)


def test_an_untested_version_is_warned_of_once_on_gpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.17.0")
    with caplog.at_level(logging.WARNING, logger=versions.__name__):
        versions.check_version(on_gpu=True)
        versions.check_version(on_gpu=True, log=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "found 0.17.0" in caplog.text
