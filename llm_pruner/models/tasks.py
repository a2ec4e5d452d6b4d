"""Tasks of transformers' model classes, and the auto class that loads the models of each task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from ..errors import PrunerError

TEXT_GENERATION, TEXT_TO_TEXT, FILL_MASK = "text-generation", "text2text-generation", "fill-mask"
FEATURES, IMAGE_TEXT = "feature-extraction", "image-text-to-text"
SPEECH, CTC = "automatic-speech-recognition", "automatic-speech-recognition-ctc"
# Tasks in transformers' names, by their auto class and its table of classes (transformers 5.23). A class that is in
# several tables has the first task.
TASKS = {
    TEXT_GENERATION: ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    TEXT_TO_TEXT: ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    IMAGE_TEXT: ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    FILL_MASK: ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "text-classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "token-classification": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "question-answering": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    SPEECH: ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    CTC: ("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES"),
    "audio-classification": ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    "image-classification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "video-classification": ("AutoModelForVideoClassification", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES"),
    "image-segmentation": ("AutoModelForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES"),
    "object-detection": ("AutoModelForObjectDetection", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES"),
    "depth-estimation": ("AutoModelForDepthEstimation", "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES"),
    "masked-image-modeling": ("AutoModelForMaskedImageModeling", "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES"),
    "multiple-choice": ("AutoModelForMultipleChoice", "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES"),
    FEATURES: ("AutoModel", "MODEL_MAPPING_NAMES"),
    "pretraining": ("AutoModelForPreTraining", "MODEL_FOR_PRETRAINING_MAPPING_NAMES"),
}
OF_VALUES = ("depth-estimation", "masked-image-modeling")
OF_WHOLE_TEXTS = ("text-classification", "token-classification", "question-answering")
OF_TOKENS = (TEXT_GENERATION, TEXT_TO_TEXT, IMAGE_TEXT)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of transformers.

    Attributes:
        name: one of :data:`TASKS`.
    """

    name: str

    @property
    def auto_class(self) -> str:
        """Name of the class of transformers that loads models for the task."""
        return TASKS[self.name][0]

    @property
    def pipeline(self) -> str:
        """Name of the task in transformers' pipelines and on the hub."""
        return self.name.removesuffix("-ctc")

    def classes(self) -> dict[str, tuple[str, ...]]:
        """Return the classes for the task, by the type of the model."""
        table = getattr(modeling_auto, TASKS[self.name][1])
        return {kind: (found,) if isinstance(found, str) else found for kind, found in table.items()}


@cache
def _by_class() -> dict[str, Task]:
    """Return the task of every class of transformers."""
    tasks: dict[str, Task] = {}
    for task in (Task(name=name) for name in TASKS):
        for classes in task.classes().values():
            for one in classes:
                tasks.setdefault(one, task)
    return tasks


def task_of(class_name: str) -> Task | None:
    """Return the task of a class, None for a class that transformers does not know.

    >>> task_of("RobertaForTokenClassification").name, task_of("LlamaForCausalLM").auto_class
    ('token-classification', 'AutoModelForCausalLM')
    """
    return _by_class().get(class_name)


def task_name(model: nn.Module) -> str | None:
    """Return the name of a model's task, None for a class that transformers does not know."""
    task = task_of(type(model).__name__)
    return None if task is None else task.name


def declared_class(config: PreTrainedConfig) -> str | None:
    """Return the class that a checkpoint declares in its ``architectures``, None if it declares none."""
    names = getattr(config, "architectures", None) or [None]
    return names[0] if isinstance(names[0], str) else None


def task_of_config(config: PreTrainedConfig) -> Task:
    """Return the task of the class that a config declares.

    A config that declares none, or a class that transformers does not know, is that of a language model, unless its
    ``auto_map`` says otherwise.
    """
    declared = declared_class(config)
    task = task_of(declared) if declared else None
    if task is not None and declared in task.classes().get(config.model_type, ()):
        return task
    for name, (auto_class, _) in TASKS.items():
        if str((getattr(config, "auto_map", None) or {}).get(auto_class, "")).rpartition(".")[2] == (declared or " "):
            return Task(name=name)
    return Task(name=TEXT_TO_TEXT if config.is_encoder_decoder else TEXT_GENERATION)


def class_for(task: str, config: PreTrainedConfig) -> str:
    """Return the class of an architecture for a task.

    Raises:
        PrunerError: there is no such task, or the architecture has no class for it.
    """
    if task not in TASKS:
        raise PrunerError(f"task {task!r} is not valid: choose from {', '.join(TASKS)}")
    classes = Task(name=task).classes().get(config.model_type)
    if not classes:
        raise PrunerError(f"{config.model_type} has no class for the task {task}")
    return classes[0]


def ask_for(task: str | None, config: PreTrainedConfig) -> None:
    """Let a config declare the class of a task, if one is named, instead of its own.

    Raises:
        PrunerError: as :func:`class_for`.
    """
    if task is not None:
        config.architectures = [class_for(task, config)]


def auto_model_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that loads a model of a config."""
    return getattr(transformers, task_of_config(config).auto_class)


def has_token_logits(model: nn.Module) -> bool:
    """Return True if the last dim of a model's output is its vocabulary."""
    return task_name(model) in (None, *OF_TOKENS, FILL_MASK, "pretraining")


def predicts_tokens(model: nn.Module) -> bool:
    """Return True for a language model: its logits are those of the next tokens, and it has a perplexity."""
    return task_name(model) in (None, *OF_TOKENS)
