"""Images and sounds as rows of a data set: local parquet files, which datasets loads as it does those of the hub."""

import io
import wave

import datasets
import numpy as np
import pytest
from helpers.media import model_of
from PIL import Image
from transformers import ViTImageProcessor

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.evaluation.labelled import check_labelled, measure_labelled
from llm_pruner.files import read_json
from llm_pruner.media import is_media, read_media
from llm_pruner.media_rows import is_on_hub


def write_pictures(folder, *, splits, count=12):
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 256, (20, 24, 3), np.uint8)) for _ in range(count)]
    names = datasets.ClassLabel(names=[f"LABEL_{i}" for i in range(5)])
    kinds = {"id": datasets.Value("string"), "image": datasets.Image(), "caption": datasets.Value("string")}
    columns = {"id": [str(i) for i in range(count)], "image": pictures, "caption": ["noise"] * count}
    columns["label"] = [i % 5 for i in range(count)]
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds | {"label": names}))
    for split in splits:
        rows.to_parquet(folder / f"{split}.parquet")


def wav(rate):
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.arange(400, dtype="<i2").tobytes())
    return content.getvalue()


def test_columns_are_found_by_their_types(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "me" / "pictures", splits=["train"])
    trained, held_out = (read_media("me/pictures", split) for split in ("train", "test"))
    assert (len(trained), len(held_out)) == (10, 2) and len(read_media("me/pictures", "train", 3)) == 3
    assert [one.label for one in held_out] == ["LABEL_4", "LABEL_4"]
    assert held_out[0].text == "noise" and held_out[0].image().size == (24, 20) and not held_out[0].is_sound
    write_pictures(tmp_path / "me" / "split", splits=["train", "test"], count=4)
    assert [len(read_media("me/split", split)) for split in ("train", "test")] == [4, 4]
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "me" / "texts" / "train.parquet")
    with pytest.raises(PrunerError, match="me/texts has no column of images or sounds; it has text"):
        read_media("me/texts", "train")


def test_sounds_of_a_data_set(tmp_path):
    rows = {"audio": [{"bytes": wav(16_000), "path": "a.wav"}, {"bytes": wav(8_000), "path": "b.wav"}]}
    sounds = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    sounds.to_parquet(tmp_path / "sounds" / "train.parquet")
    first, second = read_media(str(tmp_path / "sounds"), None)
    assert first.is_sound and len(first.sound(16_000)) == 400
    with pytest.raises(PrunerError, match="row 1 has 16 bits at 8000 Hz and the model reads 16 bits at 16000 Hz"):
        second.sound(16_000)


def test_rows_without_a_sound_are_left_out(tmp_path):
    sounds = [{"bytes": wav(16_000), "path": None}, None, {"bytes": None, "path": None}]
    for folder, chosen in (("sounds", slice(3)), ("none", slice(1, 3))):
        rows = datasets.Dataset.from_dict({"audio": sounds, "text": [*"bac"]}).select(range(3)[chosen])
        rows.cast_column("audio", datasets.Audio(decode=False)).to_parquet(tmp_path / folder / "train.parquet")
    (sound,) = read_media(str(tmp_path / "sounds"), None)
    assert sound.text == "b" and len(sound.sound(16_000)) == 400
    with pytest.raises(PrunerError, match="holds no rows with an image or a sound"):
        read_media(str(tmp_path / "none"), None)


def test_names_of_the_hub(monkeypatch):
    assert is_on_hub("owner/name") and is_media("owner/name.v2") and not is_media("c4")
    assert not is_media("texts/missing.jsonl") and not is_media("/owner/name")

    def offline(*_, **__):
        raise ConnectionError("offline mode")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(PrunerError, match=r"owner/name could not be fetched .*offline mode.*; give a local"):
        check_labelled("owner/name")


def test_prune_and_measure_on_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "me" / "pictures", splits=["train"])
    lp.save(model_of("ViTForImageClassification"), None, tmp_path / "original")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "original")
    prune = "prune original pruned --pruning_ratio 0.25 --kinds neurons --calib_dataset me/pictures --preset fast"
    assert main([*prune.split(), "--eval_datasets", "me/pictures"]) == 0
    assert 0 <= read_json(tmp_path / "pruned" / "metrics.json")["after"]["similarity"]["me/pictures"]["agreement"] <= 1
    model, _ = lp.load("original")
    assert 0 <= measure_labelled(model, None, "me/pictures")["acc"] <= 1
