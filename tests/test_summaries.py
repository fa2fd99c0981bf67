"Summaries with pictures: what no single notebook owns: resuming, caches, odd documents, pixels, the missing extra."
import json, sys
from dataclasses import replace
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.testing import assert_close
from vlwb.core import DataError
from vlwb.data.documents import DocumentConfig, Documents, make_documents
from vlwb.data.inputs import ImageTransform, LoadedImages, WordTokenizer
from vlwb.eval.summaries import (SITA_PRESETS, Sita, SitaPreset, choose_picture, image_precision, judge_summaries, lead, picture_scores, random_pictures,
                                 random_precision, rouge, sita_figures, summarise_document, train_sita)
from vlwb.models.albef import AlbefConfig, AlbefModel
from vlwb.models.alignment import AlignmentConfig
from vlwb.models.summariser import Summariser, SummariserConfig, sentence_places
from vlwb.train.alignment import AlignmentPreset
from vlwb.train.loop import TrainConfig
from vlwb.train.summaries import SUMMARY_PRESETS, SummaryPreset, SummarySet, chosen_captions, text_row, train_summaries, write_summaries

SMALL = SummariserConfig(width=16, encoder_layers=1, decoder_layers=1, heads=2, initializer_range=0.3)
QUICK = TrainConfig(steps=4, lr=1e-3, device='cpu', checkpoint_every=2)
PRESET = SummaryPreset('quick', SMALL, short=QUICK, short_batch=4, train=QUICK, batch_size=4, max_tokens=12, beams=2)


@pytest.fixture(scope='module')
def documents(): return make_documents(12, seed=1, split='train', config=DocumentConfig(image_size=32))


@pytest.fixture(scope='module')
def tokenizer(documents): return WordTokenizer.learn(documents.texts)


def test_resumed_equals_uninterrupted(documents, tokenizer, tmp_path):
    "Cut in the first stage or in the second, a run ends with the same weights."
    picked = chosen_captions(documents, 'oracle')
    whole, _ = train_summaries(tokenizer, documents, picked, PRESET, folder=tmp_path/'whole', progress=False)
    class Cut(Exception): pass
    def cut(model): raise Cut
    watched = replace(PRESET, train=replace(QUICK, evaluate_every=3))
    with pytest.raises(Cut): train_summaries(tokenizer, documents, picked, watched, folder=tmp_path/'cut', evaluate=cut, progress=False)
    assert [p.name for p in (tmp_path/'cut'/'summaries').glob('checkpoint-*')] == ['checkpoint-00000002']
    again, _ = train_summaries(tokenizer, documents, picked, PRESET, folder=tmp_path/'cut', progress=False)
    for (name, a), b in zip(whole.named_parameters(), again.parameters()): assert_close(a, b, rtol=0, atol=0, msg=name)


def test_seeds_and_sources_differ(documents, tokenizer):
    weights = lambda preset, picked: train_summaries(tokenizer, documents, picked, preset, progress=False)[0].state_dict()['bart.model.shared.weight']
    oracle = chosen_captions(documents, 'oracle')
    same, other, without = weights(PRESET, oracle), weights(PRESET.seeded(1), oracle), weights(PRESET, None)
    assert torch.equal(same, weights(PRESET, oracle)) and not torch.equal(same, other) and not torch.equal(same, without)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(local=st.booleans(), merge=st.sampled_from(['mean', 'gate']), beams=st.integers(1, 3), seed=st.integers(0, 99))
def test_cache_of_two_sources(local, merge, beams, seed):
    "Generation with and without the cache writes the same, whatever the padding of either source."
    torch.manual_seed(seed)
    model = Summariser(replace(SMALL, vocab_size=30, local=local, merge=merge, max_length=64)).eval().double()
    document, captions = torch.randint(4, 30, (3, 14)), torch.randint(4, 30, (3, 8))
    document[:,[0, 5]], captions[:,[0, 4]] = 2, 2
    document[0,9:], captions[1,4:], captions[2] = 0, 0, 0
    texts = dict(input_ids=document, attention_mask=(document > 0).long(), caption_ids=captions, caption_mask=(captions > 0).long())
    write = lambda t, **more: model.generate(t, beams=beams, max_tokens=10, no_repeat=2, **more)
    out = write(texts)
    assert torch.equal(out, write(texts, cache=False))
    wider = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in texts.items()}
    summary = torch.randint(4, 30, (3, 6))
    assert_close(model(wider, summary), model(texts, summary), rtol=1e-9, atol=1e-9)
    alone = {k: v[2:] for k, v in texts.items() if not k.startswith('caption')}
    assert_close(model(alone, summary[2:]), model(texts, summary)[2:], rtol=1e-9, atol=1e-9)      # a row without captions is a document without captions


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_sentence_places(lengths):
    ids = torch.tensor([[t for n in lengths for t in [2] + [7]*(n - 1)] + [3]])
    number, place = sentence_places(ids, 2)
    assert number[0,:-1].tolist() == [i + 1 for i, n in enumerate(lengths) for _ in range(n)]
    assert place[0,:-1].tolist() == [k for n in lengths for k in range(n)]


def test_odd_documents(tokenizer):
    "One document; no pictures; a picture without a caption; far too many sentences; an unknown word."
    rows = [['rain fell .'], ['zebra !'], ['a red star .']*200]
    odd = Documents(['a', 'b', 'c'], rows, [np.zeros(0, np.int64), np.array([0, 1]), np.array([2])], ['p', 'q', 'r'])
    model = Summariser(replace(SMALL, vocab_size=len(tokenizer))).eval()
    out = write_summaries(model, tokenizer, odd, [np.zeros(0, np.int64), np.array([0, -1]), np.array([199])], beams=1, max_tokens=6, attention=True)
    assert [o[2].shape[1] for o in out] == [0, 2, 1]
    assert not out[1][2][:,1].any() and np.allclose(out[1][2][:,0], 1) and np.allclose(out[2][2], 1)
    assert write_summaries(model, tokenizer, odd[[0]], None, beams=1, max_tokens=6) == [out[0][0]]
    assert write_summaries(model, tokenizer, odd[np.zeros(0, int)]) == []
    assert len(SummarySet(tokenizer, odd, limit=40).document[2]) == 40
    with pytest.raises(ValueError, match='without a sentence'): SummarySet(tokenizer, Documents(['x'], [[]], [np.zeros(0, int)], []))


def test_captions_are_truly_read(documents, tokenizer):
    "The set gives the sentences that were picked, in the order of the pictures."
    data = SummarySet(tokenizer, documents, chosen_captions(documents, 'pseudo', [np.zeros(len(i), int) for i in documents.image]))
    first = text_row(tokenizer, [documents.sentences[0][0]])[0][:-1]
    assert data.captions[0] == first*len(documents.image[0]) + [3]


def test_rouge_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'rouge_score.rouge_scorer', None)
    with pytest.raises(ImportError, match=r'vlwb\[summaries\]'): rouge([['a']], [['a']])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_image_precision(reference, draw):
    chosen = [draw.randrange(-1, len(r)) for r in reference]
    value = image_precision(chosen, reference)
    order = list(range(len(reference))); draw.shuffle(order)
    again = image_precision([chosen[i] for i in order], [reference[i] for i in order])
    assert (np.isnan(value) and np.isnan(again) and not any(map(any, reference))) or (0 <= value <= 100 and value == pytest.approx(again))
    best = [int(np.argmax(r)) for r in reference]
    if any(map(any, reference)): assert image_precision(best, reference) == 100


def test_gold_is_perfect(documents):
    figures = judge_summaries(documents, documents.summary, [int(np.argmax(r)) for r in documents.reference])
    assert set(figures.values()) == {100.}
    assert judge_summaries(documents, [[] for _ in documents.summary])['ROUGE-1'] == 0
    assert 0 < judge_summaries(documents, lead(documents))['ROUGE-1'] < 60 and 0 < random_precision(documents) < 100
    assert (random_pictures(documents, 3) == random_pictures(documents, 3)).all()


def test_choice():
    eye = torch.eye(3)
    assert choose_picture(picture_scores(eye, eye[2:], np.array([0, 0, 5]))) == 2
    assert choose_picture(picture_scores(eye, eye[2:], np.array([0, 0, -1]))) == 0
    assert choose_picture(picture_scores(eye[:0], eye, np.zeros(0, int))) == -1


def test_sita_on_pixels(documents, tokenizer, tmp_path):
    "Real documents come as pictures in files: pixels through a transform, a model for them, everything saved and read."
    torch.manual_seed(0)
    start = AlbefModel(AlbefConfig(image_size=16, patch_size=8, channels=3, vocab_size=tokenizer.vocab_size, max_length=64, vision_layers=1, text_layers=1, fusion_layers=1)).eval()
    preset = SitaPreset('quick', AlignmentPreset('quick', AlignmentConfig(keep=2), train=replace(QUICK, steps=1, checkpoint_every=0), batch_size=6, rounds=1), PRESET)
    images = LoadedImages(documents, ImageTransform(16))
    sita = train_sita(start, tokenizer, documents, images, preset, folder=tmp_path/'sita', progress=False)
    again = Sita.from_pretrained(tmp_path/'sita')
    assert again.preset == preset and json.dumps(sita_figures(again, documents, images)) == json.dumps(sita_figures(sita, documents, images))
    one = documents[4]
    result = summarise_document(again, one, LoadedImages(one, ImageTransform(16)))
    assert result.chosen in range(len(one.image[0])) or not result.summary
    assert sorted(set(result.caption.tolist())) == sorted(result.caption.tolist())              # one sentence each
    text = json.loads((tmp_path/'sita'/'sita.json').read_text()); text['preset']['summaries']['widht'] = 3
    (tmp_path/'sita'/'sita.json').write_text(json.dumps(text))
    with pytest.raises(DataError, match='sita.json'): Sita.from_pretrained(tmp_path/'sita')


def test_presets():
    assert set(SITA_PRESETS) == {'sita', 'sita-tiny'} == set(SUMMARY_PRESETS)
    tiny = SITA_PRESETS['sita-tiny'].changed(scale=0.1, seed=7, device='cpu')
    assert {tiny.summaries.short.seed, tiny.summaries.train.seed, tiny.alignment.train.seed} == {7} and tiny.summaries.train.steps == round(SITA_PRESETS['sita-tiny'].summaries.train.steps*0.1)
    assert SITA_PRESETS['sita'].summaries.start == 'facebook/bart-base' and SITA_PRESETS['sita'].summaries.extract_weight == 0


def test_sita_over_a_published_bart(documents, tokenizer, tmp_path):
    "A summariser that starts from a BART's folder reads and writes with that BART's tokeniser; without captions it begins as that BART."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast
    words = ['<s>', '<pad>', '</s>', '<unk>', *tokenizer.words]
    hub = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    hub.pre_tokenizer, hub.post_processor = pre_tokenizers.WhitespaceSplit(), processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
    PreTrainedTokenizerFast(tokenizer_object=hub, bos_token='<s>', eos_token='</s>', pad_token='<pad>', unk_token='<unk>').save_pretrained(tmp_path/'bart')
    torch.manual_seed(0)
    BartForConditionalGeneration(BartConfig(vocab_size=len(words), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=256)).save_pretrained(tmp_path/'bart')
    start = AlbefModel(AlbefConfig(image_size=16, patch_size=8, channels=3, vocab_size=tokenizer.vocab_size, max_length=64, vision_layers=1, text_layers=1, fusion_layers=1)).eval()
    published = replace(SITA_PRESETS['sita'].summaries, start=str(tmp_path/'bart'), train=QUICK, epochs=0., batch_size=4, max_tokens=10, beams=2)
    preset = SitaPreset('published', AlignmentPreset('quick', AlignmentConfig(keep=2), train=replace(QUICK, steps=1, checkpoint_every=0), batch_size=6, rounds=1), published)
    images = LoadedImages(documents, ImageTransform(16))
    sita = train_sita(start, tokenizer, documents, images, preset, folder=tmp_path/'sita', progress=False)
    assert sita.summariser.config.bart['d_model'] == 16 and not sita.summariser.config.local and sita.words.vocab_size == len(words)
    again = Sita.from_pretrained(tmp_path/'sita')
    assert json.dumps(sita_figures(again, documents, images)) == json.dumps(sita_figures(sita, documents, images))
    row, _ = text_row(again.words, documents.sentences[0])
    assert row[0] == 0 and row[-1] == 2 and 3 not in row
