"Statements about two pictures: truth recomputed from the sentence alone, readers against damage, and a whole run."
import json, re
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from vlwb.core import DataError, seed_everything
from vlwb.data.inputs import WordTokenizer
from vlwb.data.statements import STATEMENT_KINDS, Statements, as_boxes, fold_of, make_statements, read_nlvr, read_nlvr2, statement_holds
from vlwb.data.world import COLOURS, SHAPES, SceneConfig, make_scenes
from vlwb.eval.statements import accuracy_and_consistency, judge_statements, statement_figures
from vlwb.models.albef import AlbefConfig, AlbefModel
from vlwb.models.two_images import TwoImageModel
from vlwb.train.loop import TrainConfig
from vlwb.train.statements import StatementPreset, StatementSet, statement_loss, train_statements

WORLD = SceneConfig(shapes=SHAPES[:5], colours=COLOURS[:6], max_objects=3)
SYNONYMS = {'disc': 'circle', 'box': 'square', 'plus sign': 'cross', 'hoop': 'ring', 'rhombus': 'diamond', 'moon': 'crescent', 'violet': 'purple'}
NUMBERS = {'one': 1, 'two': 2, 'three': 3, 'four': 4}


def thing(words):
    "(colour, shape) that a noun phrase names, None where it does not say."
    if re.search(r'(boxes|crosses|rhombuses)$', words): words = words[:-2]
    elif words.endswith('s') and not words.endswith('cross'): words = words[:-1]
    for name, plain in SYNONYMS.items(): words = words.replace(name, plain)
    return next((c for c in COLOURS if re.search(rf'\b{c}\b', words)), None), next((s for s in SHAPES if re.search(rf'\b{s}\b', words)), None)


def objects(scenes, i):
    "The objects of a scene from its description in words: (colour, shape, column, row)."
    found = [re.fullmatch(r'\w+ (\w+) (\w+) at \((.+), (.+)\)', line).groups() for line in scenes.describe(i)]
    column, row = scenes.cell
    return [(c, s, int(column[i,k]), int(row[i,k])) for k, (c, s, _, _) in enumerate(found)]


def count(picture, named): return sum(named[0] in (None, c) and named[1] in (None, s) for c, s, _, _ in picture)


def related(picture, a, relation, b):
    place = {'left of': lambda p, q: p[2] < q[2], 'right of': lambda p, q: p[2] > q[2], 'above': lambda p, q: p[3] < q[3], 'below': lambda p, q: p[3] > q[3]}[relation]
    return any(place(p, q) for i, p in enumerate(picture) for j, q in enumerate(picture) if i != j and count([p], a) and count([q], b))


def truth_of(sentence, left, right):
    "Truth of a sentence about two lists of objects, by patterns over its words: shares no code with the package."
    sides = dict(left=left, right=right)
    match = lambda pattern: re.fullmatch(pattern, sentence)
    if m := match(r'there is (.+) in the left picture and (.+) in the right one') or match(r'the left picture has (.+) and the right picture (.+)'): return bool(count(left, thing(m[1])) and count(right, thing(m[2])))
    for pattern in (r'there are more (?P<a>.+) in the (?P<side>left|right) picture than in the (left|right) one', r'the (?P<side>left|right) picture has more (?P<a>.+) than the (left|right) picture'):
        if m := match(pattern): return count(sides[m['side']], thing(m['a'])) > count(sides['right' if m['side'] == 'left' else 'left'], thing(m['a']))
    for pattern in (r'at least one of the pictures shows exactly (?P<n>\w+) (?P<a>.+)', r'exactly (?P<n>\w+) (?P<a>.+) can be seen in at least one picture'):
        if m := match(pattern): return NUMBERS[m['n']] in (count(left, thing(m['a'])), count(right, thing(m['a'])))
    for pattern in (r'the two pictures together have (?P<n>\w+) (?P<a>.+)', r'together the pictures show exactly (?P<n>\w+) (?P<a>.+)'):
        if m := match(pattern): return NUMBERS[m['n']] == count(left, thing(m['a'])) + count(right, thing(m['a']))
    relation = '(left of|right of|above|below)'
    if m := match(rf'in both pictures (.+) is {relation} (.+)') or match(rf'both pictures show (.+) {relation} (.+)'): return all(related(p, thing(m[1]), m[2], thing(m[3])) for p in (left, right))
    for pattern in (r'only the (?P<side>left|right) picture has (?P<a>.+)', r'the (?P<side>left|right) picture shows (?P<a>.+) but the (left|right) one does not', r'(?P<a>.+) can be seen in the (?P<side>left|right) picture only'):
        if m := match(pattern): return bool(count(sides[m['side']], thing(m['a']))) and not count(sides['right' if m['side'] == 'left' else 'left'], thing(m['a']))
    for pattern in (r'there is (?P<a>.+) in the (?P<side>left|right) picture', r'the (?P<side>left|right) picture shows (?P<a>.+)', r'(?P<a>.+) can be seen in the (?P<side>left|right) picture'):
        if m := match(pattern): return bool(count(sides[m['side']], thing(m['a'])))
    for pattern in (r'there is (.+) in both pictures', r'both pictures show (.+)', r'each of the two pictures has (.+)'):
        if m := match(pattern): return bool(count(left, thing(m[1])) and count(right, thing(m[1])))
    raise AssertionError(f'no pattern reads {sentence!r}')


def test_truth_from_the_words_alone():
    scenes = make_scenes(500, seed=11, config=WORLD, split='train')
    made = make_statements(scenes, 3200, seed=2)
    seen = [objects(scenes, i) for i in range(len(scenes))]
    again = [truth_of(t, seen[l], seen[r]) for t, (l, r) in zip(made.text, made.image)]
    wrong = [(t, bool(y)) for t, a, y in zip(made.text, again, made.label) if a != y]
    assert not wrong, wrong[:5]
    assert set(made.kind) == set(STATEMENT_KINDS)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 6]), st.floats(0, 1))
def test_balance_for_any_draw(seed, per_sentence, hard):
    scenes = make_scenes(250, seed=seed, config=WORLD)
    made = make_statements(scenes, 48*per_sentence//2, seed, per_sentence=per_sentence, hard=hard)
    assert (made.label.reshape(-1, per_sentence).sum(1) == per_sentence//2).all()
    assert (statement_holds(scenes, made.form, made.image) == (made.label == 1)).all()
    assert (made.image[:,0] != made.image[:,1]).all() and len(set(made.text[:per_sentence])) == 1
    swapped = statement_holds(scenes, made.form, made.image[:,::-1])
    even = np.isin(made.kind, ('both', 'count', 'total', 'relation'))
    assert (swapped == (made.label == 1))[even].all() and not (swapped == (made.label == 1))[~even].all()


def test_selection_keeps_positions():
    scenes = make_scenes(60, seed=0, config=WORLD)
    made = make_statements(scenes, 64, seed=0, pixels=32)
    part = made[np.array([5, 0, 63])]
    assert len(part) == 3 and part.text[1] == made.text[0] and (part.image[2] == made.image[63]).all() and part.num_images == 60
    assert part.load_image(7).size == (32, 32) and len(made[made.label == 1]) == 32 and len(made[:0]) == 0
    with pytest.raises(ValueError, match='no pictures of their own'): make_statements(scenes, 8).load_image(0)


def rows_of(n=4):
    return [dict(identifier=f'dev-{i//2}-{i % 2}-0', sentence=f'Sentence {i//2}.', label=str(i % 2 == 0)) for i in range(n)]


def write_nlvr2(folder, rows):
    for row in rows:
        name = '-'.join(str(row.get('identifier', '')).split('-')[:3])
        for side in (0, 1): Image.new('RGB', (4, 4), (side*255, 0, 0)).save(folder/f'{name}-img{side}.png')
    (folder/'dev.json').write_text('\n'.join(map(json.dumps, rows)))
    return folder/'dev.json'


def test_nlvr2_consistency_is_the_official_one(tmp_path):
    "The published script blanks the pair number of the identifier and asks for all of them right."
    read = read_nlvr2(write_nlvr2(tmp_path, rows_of(6)))
    right = [True, True, True, False, False, False]
    official = {}
    for name, ok in zip(read.statement_ids, right):
        parts = name.split('-'); parts[2] = ''
        official['-'.join(parts)] = official.get('-'.join(parts), True) and ok
    got = accuracy_and_consistency(right, read.group)
    assert got == pytest.approx(dict(accuracy=50., consistency=100*sum(official.values())/len(official)))
    assert read.load_image(int(read.image[0,1])).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize('change, message', [
    (dict(identifier='dev-1-0'), 'split-set-pair-sentence'), (dict(identifier=None), 'split-set-pair-sentence'), (dict(identifier=7), 'split-set-pair-sentence'),
    (dict(label='yes'), 'must be true or false'), (dict(label=[1]), 'must be true or false'), (dict(label=0.5), 'must be true or false'), (dict(sentence=''), "'sentence' must be text"), (dict(sentence=3), "'sentence' must be text"),
    (dict(identifier='dev-0-0-0'), 'used before'), (dict(identifier='dev-9-0-0'), 'is missing below')])
def test_nlvr2_damage_is_named(tmp_path, change, message):
    rows = rows_of()
    path = write_nlvr2(tmp_path, rows)
    path.write_text('\n'.join(map(json.dumps, rows[:2] + [rows[2] | change] + rows[3:])))
    with pytest.raises(DataError, match='dev.json, line 3') as e: read_nlvr2(path)
    assert message in str(e.value)
    kept = read_nlvr2(path, on_error='skip')
    assert len(kept) == 3 and len(kept.problems) == 1


def test_readers_refuse_what_is_no_set(tmp_path):
    (tmp_path/'a.json').write_text('{}\n')
    for read in (read_nlvr2, read_nlvr):
        with pytest.raises(DataError): read(tmp_path/'a.json')
        with pytest.raises(DataError, match='not one usable'): read(tmp_path/'a.json', on_error='skip')
        with pytest.raises(DataError): read(tmp_path/'gone.json')
        with pytest.raises(ValueError, match='check'): read(tmp_path/'a.json', check='all')
    (tmp_path/'up.jsonl').write_text(json.dumps(dict(identifier='1-0', sentence='a', label=True, file='../../x.png')))
    with pytest.raises(DataError, match='leads outside'): read_nlvr(tmp_path/'up.jsonl')
    (tmp_path/'hidden.json').write_text(json.dumps(dict(identifier='test2-1-0-0', sentence='a')))
    assert read_nlvr2(tmp_path/'hidden.json', images=False).label.tolist() == [-1]


def test_pictures_by_identifier_and_directory(tmp_path):
    "dev-850-0-0 is about dev-850-0-img0.png and -img1.png; a training row names the folder of its pictures."
    rows = [dict(identifier='dev-850-0-0', sentence='a', label='True'), dict(identifier='dev-850-0-1', sentence='b', label='False', directory=3)]
    (tmp_path/'dev.json').write_text('\n'.join(map(json.dumps, rows)))
    found = read_nlvr2(tmp_path/'dev.json', check='none')
    assert found.image_ids == ['dev-850-0-img0.png', 'dev-850-0-img1.png'] and found.image.tolist() == [[0, 1], [0, 1]] and found.group == ['dev-850-0', 'dev-850-1']
    assert [p.relative_to(tmp_path.resolve()).as_posix() for p in found.images] == ['dev-850-0-img0.png', 'dev-850-0-img1.png']
    (tmp_path/'train.json').write_text(json.dumps(dict(identifier='train-10171-0-0', sentence='a', label='True', directory=63)))
    assert [p.relative_to(tmp_path.resolve()).as_posix() for p in read_nlvr2(tmp_path/'train.json', check='none').images] == ['63/train-10171-0-img0.png', '63/train-10171-0-img1.png']


@pytest.mark.parametrize('read', [read_nlvr2, read_nlvr])
@pytest.mark.parametrize('content', ['', '[]', 'null', '3', '"text"', '[[1]]', '{"identifier":', '\xff'])
def test_damaged_files_are_named(tmp_path, read, content):
    path = tmp_path/'dev.json'; path.write_bytes(content.encode('latin-1'))
    for on_error in ('raise', 'skip'):
        with pytest.raises(DataError, match='dev.json'): read(path, images=False, on_error=on_error)


def test_empty_sets_of_statements():
    scenes = make_scenes(40, seed=0, config=WORLD)
    none = make_statements(scenes, 0, pixels=16)
    assert len(none) == 0 and none.image.shape == (0, 2) and none.num_images == 40 and '0 about 2' in repr(none) and len(none[:0]) == 0
    assert statement_holds(scenes, none.form, none.image).shape == (0,) and none.load_image(0).size == (16, 16)
    some = make_statements(scenes, 8)
    assert some[3].text == [some.text[3]] and len(some[-1]) == 1
    with pytest.raises(ValueError, match='negative'): make_statements(scenes, -4)
    with pytest.raises(ValueError, match='cannot be dealt'): fold_of(none)
    with pytest.raises(ValueError, match='cannot be dealt'): fold_of(some, 0)
    boxes = as_boxes(Statements([], np.zeros((0, 1)), [], [], [], [], [], []), 8)
    assert boxes.image.shape == (0, 3) and boxes.images.shape == (0, 8, 8, 3)


def test_boxes_and_folds(tmp_path):
    picture = Image.new('RGB', (400, 100), (10, 10, 10))
    for k, left in enumerate((0, 150, 300)): picture.paste((100*k, 50, 0), (left, 0, left + 100, 100))
    rows = []
    for i in range(8):
        picture.save(tmp_path/f'{i}.png')
        rows.append(dict(identifier=f'{i//2}-{i % 2}', sentence=f's{i//4}', label=bool(i % 2), file=f'{i}.png'))
    (tmp_path/'pairs.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    read = read_nlvr(tmp_path/'pairs.jsonl')
    boxes = as_boxes(read, 8)
    assert boxes.image.shape == (8, 3) and [tuple(boxes.images[k,4,4]) for k in range(3)] == [(0, 50, 0), (100, 50, 0), (200, 50, 0)]
    fold = fold_of(read, 2)
    assert len(set(fold[:4])) == len(set(fold[4:])) == 1 and fold[0] != fold[4]
    Image.new('RGB', (40, 40)).save(tmp_path/'0.png')
    with pytest.raises(DataError, match='400 x 100'): as_boxes(read, 8)


def small_model(vocab):
    seed_everything(0)
    return TwoImageModel.from_albef(AlbefModel(AlbefConfig(vision_width=16, vision_layers=1, vision_heads=2, text_width=16, text_layers=1, fusion_layers=1, text_heads=2, vocab_size=vocab)))


def test_a_run_from_statements_to_figures(tmp_path):
    scenes = make_scenes(80, seed=0, config=WORLD)
    made, features = make_statements(scenes, 64, seed=0), torch.randn(80, 512)
    tokenizer = WordTokenizer.learn(made.text)
    model = small_model(tokenizer.vocab_size)
    preset = StatementPreset('t', TrainConfig(steps=3, log_every=1, device='cpu'), batch_size=16)
    log = train_statements(model, tokenizer, made, features, preset, tmp_path, progress=False)
    assert len(log) == 3 and (tmp_path/'model'/'config.json').exists()
    whole = judge_statements(model, tokenizer, made, features)
    pieces = np.concatenate([judge_statements(model, tokenizer, made[np.array([i])], features) for i in range(12)])
    np.testing.assert_allclose(whole[:12], pieces, atol=1e-5)            # whatever else is in the batch
    blank = statement_figures(model, tokenizer, made, features, blank=True)
    assert blank['accuracy'] == 50 and blank['consistency'] == 0


def test_unknown_truth_takes_no_part():
    scenes = make_scenes(80, seed=0, config=WORLD)
    made, features = make_statements(scenes, 16, seed=0), torch.randn(80, 512)
    made.label[4:8] = -1
    model = small_model(WordTokenizer.learn(made.text).vocab_size)
    data = StatementSet(made, WordTokenizer.learn(made.text), features, whole_sentences=False)
    batch = data.rows(np.arange(16))
    loss, _ = statement_loss(model(batch.images, batch.texts), batch.texts['label'])
    keep = data.rows(np.r_[0:4, 8:16])
    torch.testing.assert_close(loss, statement_loss(model(keep.images, keep.texts), keep.texts['label'])[0])
    assert statement_figures(model, WordTokenizer.learn(made.text), made, features)['statements'] == 12


def test_statements_check_their_columns():
    good = dict(text=['a'], image=[[0, 1]], label=[1], group=['g'], kind=[''], statement_ids=['1'], image_ids=['x', 'y'])
    Statements(**good)
    for wrong in (dict(image=[0]), dict(image=[[0, 2]]), dict(label=[3]), dict(group=[]), dict(image_ids=['x', 'x']), dict(images=[1])):
        with pytest.raises(ValueError): Statements(**good | wrong)
