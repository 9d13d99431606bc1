import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import small_model
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from transformers_degmix import DeGMixConfig, DeGMixForMultiTaskDensePrediction, DeGMixImageProcessorPil
from transformers_degmix.data.augmentation import Augmentation
from transformers_degmix.data.collator import DeGMixDataCollator
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms
from transformers_degmix.evaluation.evaluator import evaluate_model
from transformers_degmix.training.trainer import AugmentedDataset, DenseMetrics, SetEpochCallback


SIZE = (32, 48)
TASKS = DeGMixConfig(tasks=ROOMS_TASKS).tasks


def build_model() -> DeGMixForMultiTaskDensePrediction:
    return small_model(tasks=TASKS)


def build_trainer(tmp_path, model, augmentation=None, **fields) -> Trainer:
    processor = DeGMixImageProcessorPil(tasks=TASKS)
    train_dataset = AugmentedDataset(load_rooms("train", 4, SIZE), DeGMixDataCollator(processor, augmentation))
    defaults = {
        "output_dir": str(tmp_path),
        "remove_unused_columns": False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "report_to": "none",
        "batch_eval_metrics": True,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model,
        TrainingArguments(**{**defaults, **fields}),
        data_collator=DeGMixDataCollator(processor, tasks=TASKS),
        train_dataset=train_dataset,
        eval_dataset=load_rooms("validation", 3, SIZE),
        compute_metrics=DenseMetrics(TASKS),
        callbacks=[SetEpochCallback(train_dataset)],
    )


def test_evaluation_gives_the_scores_of_the_loop(tmp_path):
    trainer = build_trainer(tmp_path, build_model())
    assert trainer.label_names == ["labels"]
    scores = trainer.evaluate()
    _, expected = evaluate_model(trainer.model, list(trainer.get_eval_dataloader()), TASKS, trainer.accelerator)
    for task, values in expected.items():
        for name, value in values.items():
            assert scores[f"eval_{task}_{name}"] == pytest.approx(value, rel=1e-5), (task, name)
    assert scores["eval_loss"] > 0
    assert trainer.evaluate()["eval_depth_rmse"] == scores["eval_depth_rmse"]  # nothing is left of the first time


def test_tasks_without_labels_are_left_out(tmp_path):
    trainer = build_trainer(tmp_path, build_model())
    scores = trainer.evaluate()
    rows = trainer.eval_dataset.remove_columns("depth")
    partial = trainer.evaluate(rows)
    assert "eval_depth_rmse" not in partial
    assert partial["eval_semseg_mean_iou"] == pytest.approx(scores["eval_semseg_mean_iou"])
    trainer.data_collator = DeGMixDataCollator(trainer.data_collator.processor, tasks={"depth": TASKS["depth"]})
    assert [name for name in trainer.evaluate() if name.endswith("rmse")] == ["eval_depth_rmse"]


def test_all_logits_at_once_give_the_same_scores(tmp_path):
    scores = [build_trainer(tmp_path, build_model(), batch_eval_metrics=each).evaluate() for each in (True, False)]
    for name in scores[0]:
        if not re.search("runtime|per_second|time", name):
            assert scores[0][name] == pytest.approx(scores[1][name]), name


def test_the_best_model_comes_back_and_training_resumes(tmp_path):
    fields = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_depth_rmse",
        "greater_is_better": False,
        "learning_rate": 1e-2,
    }
    augmentation = Augmentation(SIZE, scale=(1, 1))
    set_seed(0)
    trainer = build_trainer(tmp_path / "whole", build_model(), augmentation, **fields)
    trainer.train()
    history = [entry["eval_depth_rmse"] for entry in trainer.state.log_history if "eval_depth_rmse" in entry]
    assert len(history) == 4
    assert trainer.evaluate()["eval_depth_rmse"] == pytest.approx(min(history), rel=1e-5)

    set_seed(1)
    resumed = build_trainer(tmp_path / "resumed", build_model(), augmentation, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    again = [entry["eval_depth_rmse"] for entry in resumed.state.log_history if "eval_depth_rmse" in entry]
    assert again == pytest.approx(history, rel=1e-5)


def test_loss_of_accumulated_passes_is_their_mean(tmp_path):
    losses = []
    for passes in (1, 2):
        fields = {"gradient_accumulation_steps": passes, "per_device_train_batch_size": 4 // passes}
        trainer = build_trainer(tmp_path, build_model(), max_steps=1, logging_steps=1, **fields)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    # Not equal: batch norms see passes, and the valid pixels of a pass count as much as those of another.
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_every_epoch_is_augmented_in_its_own_way(tmp_path):
    trainer = build_trainer(tmp_path, build_model(), Augmentation(SIZE), num_train_epochs=2, max_steps=-1)
    collate, batches = trainer.data_collator, []

    def recorded(rows):
        batches.append(collate(rows))
        return batches[-1]

    trainer.data_collator = recorded
    trainer.train()
    images = [image for batch in batches for image in batch["pixel_values"]]
    assert len(images) == 8  # 4 images, 2 epochs
    assert not any(torch.equal(images[i], images[j]) for i in range(8) for j in range(i))


def test_metrics_before_the_last_batch_are_empty():
    metrics = DenseMetrics({"depth": {"kind": "depth", "num_labels": 1}})
    prediction = EvalPrediction({"depth": np.full((1, 1, 2, 2), 2.0)}, {"depth": np.full((1, 2, 2), 1.0)})
    assert metrics(prediction, compute_result=False) == {}
    prediction = EvalPrediction({"depth": torch.full((1, 1, 2, 2), 1.0)}, {"depth": torch.full((1, 2, 2), 1.0)})
    assert metrics(prediction)["depth_rmse"] == pytest.approx(0.5**0.5)


def test_lora_on_the_backbone(tmp_path):
    model = build_model()
    # Transformers 5.17 has `query` where later ones have `q_proj`.
    targets = r"model\.backbone\..*(query|q_proj|value|v_proj)"
    # With the statistics of their batch norms, which training changes.
    whole = [f"{part}.{task}" for part in ("mixers", "heads") for task in TASKS]
    lora = LoraConfig(r=2, target_modules=targets, modules_to_save=whole)
    trainer = build_trainer(
        tmp_path, get_peft_model(model, lora), label_names=["labels"], learning_rate=1e-2, lr_scheduler_type="constant"
    )
    trained, total = trainer.model.get_nb_trainable_parameters()
    assert 0 < trained < total
    trainer.train()
    assert trainer.evaluate()["eval_depth_rmse"] > 0
    trainer.save_model(tmp_path / "adapter")

    fresh = PeftModel.from_pretrained(build_model(), tmp_path / "adapter").eval()
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        outputs, expected = fresh(images).logits, trainer.model.eval()(images).logits
        unchanged = build_model()(images).logits
    for task in TASKS:
        torch.testing.assert_close(outputs[task], expected[task])
        assert not torch.allclose(outputs[task], unchanged[task], atol=1e-3)
