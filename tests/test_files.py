"""Files appear whole or not at all, whoever else writes."""

import os

from transformers_degmix.files import write_whole


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"

    def write(file):
        file.write(b"outer")
        write_whole(path, lambda inner: inner.write(b"inner"))
        assert path.read_bytes() == b"inner"

    write_whole(path, write)
    assert path.read_bytes() == b"outer" and os.listdir(tmp_path) == ["a"]
