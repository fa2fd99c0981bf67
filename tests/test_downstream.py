"What the models of downstream tasks share: half precision, a single row, dropout that rests while they judge, runs that are cut."
from dataclasses import replace
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from vlwb.core import seed_everything
from vlwb.data.documents import DocumentConfig, make_documents
from vlwb.data.inputs import TensorImages, WordTokenizer
from vlwb.data.questions import make_questions
from vlwb.data.statements import make_statements
from vlwb.data.world import SceneConfig, make_scenes
from vlwb.models.albef import AlbefConfig, AlbefModel
from vlwb.models.alignment import AlignmentConfig, AlignmentModel
from vlwb.models.answering import AnswerModel
from vlwb.models.summariser import Summariser, SummariserConfig
from vlwb.models.two_images import TwoImageModel
from vlwb.train.alignment import ALIGNMENT_PRESETS, AlignmentObjective, AlignmentSet, train_alignment
from vlwb.train.answering import AnsweringConfig, QuestionSet, answer_objective, train_answering
from vlwb.train.loop import TrainConfig
from vlwb.train.statements import StatementObjective, StatementPreset, StatementSet, train_statements
from vlwb.train.summaries import SummaryObjective, SummarySet

WORLD = SceneConfig(max_objects=3)
RUN = TrainConfig(steps=4, lr=1e-3, device='cpu', checkpoint_every=2)


def albef(words, **changes):
    seed_everything(0)
    return AlbefModel(AlbefConfig(vocab_size=words.vocab_size + 1, max_length=64, **changes)).eval()


def features(n): return torch.randn(n, 512, generator=torch.Generator().manual_seed(1))


def answering(rows=6):
    scenes = make_scenes(80, seed=1, config=WORLD, split='train')
    questions = make_questions(scenes, 20, seed=0)
    words = WordTokenizer.learn(questions.text + [a for given in questions.answers for a in given])
    model, images = AnswerModel.from_albef(albef(words)), TensorImages(features(len(scenes)))
    return model, QuestionSet(questions, words, images).batch(np.arange(rows)), answer_objective, (words, questions, images)


def statements(rows=4):
    scenes = make_scenes(80, seed=1, config=WORLD, split='train')
    made = make_statements(scenes, 64, seed=0)
    words = WordTokenizer.learn(made.text)
    model, images = TwoImageModel.from_albef(albef(words)), features(len(scenes))
    return model, StatementSet(made, words, images, whole_sentences=False).batch(np.arange(rows)), StatementObjective(), (words, made, images)


def alignment(rows=3):
    documents = make_documents(12, seed=1, split='train', config=DocumentConfig(image_size=32))
    words, images = WordTokenizer.learn(documents.texts), features(len(documents.image_ids))
    start = albef(words)
    targets = [np.eye(len(s), dtype=np.float32)[c] for s, c in zip(documents.sentences, documents.caption)]
    return AlignmentModel.from_albef(start, AlignmentConfig(keep=2)), AlignmentSet(documents, images, words, targets).batch(np.arange(rows)), AlignmentObjective(across_weight=1.), (words, documents, images, start)


def summaries(rows=3):
    documents = make_documents(8, seed=1, split='train', config=DocumentConfig(image_size=32))
    words = WordTokenizer.learn(documents.texts)
    seed_everything(0)
    model = Summariser(SummariserConfig(vocab_size=words.vocab_size, width=16, encoder_layers=1, decoder_layers=1, heads=2)).eval()
    return model, SummarySet(words, documents, documents.caption).batch(np.arange(rows)), SummaryObjective(model.pad), (words, documents)


MADE = dict(answering=answering, statements=statements, alignment=alignment, summaries=summaries)


@pytest.mark.parametrize('name', MADE)
def test_half_precision(name):
    "Weights in bfloat16, and autocast: loss and gradients are finite and near those of float32."
    model, batch, objective, _ = MADE[name]()
    exact, _ = objective(model, batch, 0)
    with torch.autocast('cpu', torch.bfloat16): mixed, _ = objective(model, batch, 0)
    half = model.to(torch.bfloat16)
    images = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.images.items()} if isinstance(batch.images, dict) else batch.images.bfloat16()
    loss, _ = objective(half, replace(batch, images=images), 0)
    loss.backward()
    for other in (mixed, loss): assert_close(other.float(), exact.float(), rtol=0.08, atol=0.05)
    grads = [p.grad for p in half.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and any(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize('name', MADE)
def test_one_row(name):
    "A batch of one has a loss, and its gradient reaches weights."
    model, batch, objective, _ = MADE[name](1)
    loss, _ = objective(model, batch, 0)
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite() and any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_answers_and_summaries_without_dropout():
    "Ranking and writing give the same twice, also from a model that is being trained; the mode is left as it was."
    model, batch, _, _ = summaries()
    noisy = Summariser(replace(model.config, dropout=0.5)).train()
    texts = {k: v for k, v in batch.texts.items() if k not in ('labels', 'said')}
    assert (noisy.generate(texts, max_tokens=12) == noisy.generate(texts, max_tokens=12)).all() and noisy.training


class Cut(Exception): pass


def cut(model): raise Cut


def answer_run(folder, watched, evaluate=None):
    model, _, _, (words, questions, images) = answering()
    config = AnsweringConfig(replace(RUN, evaluate_every=3*watched), 8, per_image=2, min_count=1)
    return train_answering(model, words, questions, images, config, folder, evaluate, progress=False)[0]


def statement_run(folder, watched, evaluate=None):
    model, _, _, (words, made, images) = statements()
    train_statements(model, words, made, images, StatementPreset('quick', replace(RUN, evaluate_every=3*watched), 8), folder, evaluate, progress=False)
    return model


def alignment_run(folder, watched, evaluate=None):
    _, _, _, (words, documents, images, start) = alignment()
    preset = replace(ALIGNMENT_PRESETS['tiny-documents'], train=replace(RUN, evaluate_every=3*watched), batch_size=4)
    return train_alignment(start, words, documents, images, preset, None, folder, evaluate, progress=False).model


@pytest.mark.parametrize('run', [answer_run, statement_run, alignment_run])
def test_resumed_equals_uninterrupted(run, tmp_path):
    "Bit for bit: a run that was cut at its third step and went on, and one that was not."
    whole = run(tmp_path/'whole', 0)
    with pytest.raises(Cut): run(tmp_path/'cut', 1, cut)
    assert list((tmp_path/'cut').glob('**/checkpoint-*'))
    again = run(tmp_path/'cut', 0)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values()): assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def test_other_data_do_not_go_on(tmp_path):
    "A folder belongs to what was learned in it: one answer changed, and the run is refused."
    model, _, _, (words, questions, images) = answering()
    config = AnsweringConfig(RUN, 8, min_count=1)
    train_answering(model, words, questions, images, config, tmp_path, progress=False)
    changed = replace(questions, answers=[questions.answers[0], *questions.answers[2:], questions.answers[1]])
    with pytest.raises(ValueError, match='another run'): train_answering(answering()[0], words, changed, images, config, tmp_path, progress=False)
