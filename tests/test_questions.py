"Questions about scenes against an independent reading of their words; VQA v2's files damaged in every way; ranking, accuracy and training against plain forms."
import itertools, json, re
from collections import defaultdict
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from vlwb.core import DataError, make_generator, seed_everything
from vlwb.data.inputs import TensorSet, WordTokenizer
from vlwb.data.questions import (QUESTION_KINDS, Questions, answer_scores, answer_targets, answer_vocabulary, blind_answers, judged_answers, make_questions, normalise_answer,
                                 read_vqa, scene_answers, write_vqa)
from vlwb.data.world import SceneConfig, make_scenes, scene_records
from vlwb.eval.answering import accuracy_by_kind, answer_questions, read_results, vqa_accuracy, write_results
from vlwb.models.albef import AlbefConfig, AlbefModel
from vlwb.models.answering import AnswerModel
from vlwb.train.answering import ANSWERING, ImageGroups, QuestionSet, answer_objective

CANONICAL = dict(disc='circle', box='square', hoop='ring', rhombus='diamond', moon='crescent', little='small', big='large', violet='purple', upper='top', lower='bottom')
SLOT = {w: 'size' for w in ('small', 'large')} | {w: 'colour' for w in 'red orange yellow green blue purple white black'.split()} | {w: 'shape' for w in 'circle square triangle star cross ring diamond crescent'.split()}
RELATIONS = [(r'(?:to the )?left of', lambda a, b: a['column'] < b['column']), (r'(?:to the )?right of', lambda a, b: a['column'] > b['column']),
             ('above|higher up than', lambda a, b: a['row'] < b['row']), ('below|lower down than', lambda a, b: a['row'] > b['row']),
             ('on the same side(?: of the picture)? as', lambda a, b: (a['column'] < 2) == (b['column'] < 2)), ('on the (?:other|opposite) side from', lambda a, b: (a['column'] < 2) != (b['column'] < 2))]


def described(phrase):
    "What a description in words asks for: slot -> value."
    phrase = re.sub('plus signs?', 'cross', phrase)
    wanted, words = {}, [w for w in re.findall('[a-z]+', phrase)]
    for word in words:
        single = {'boxes': 'box', 'crosses': 'cross', 'rhombuses': 'rhombus'}.get(word, word)
        for w in (single, single.removesuffix('s')):
            w = CANONICAL.get(w, w)
            if w in SLOT: wanted[SLOT[w]] = w; break
            if w in ('left', 'right'): wanted['side'] = w; break
            if w in ('top', 'bottom'): wanted['level'] = w; break
    return wanted


def fits(thing, wanted):
    place = dict(side='left' if thing['column'] < 2 else 'right', level='top' if thing['row'] < 2 else 'bottom')
    return all((thing | place)[s] == v for s, v in wanted.items())


def answer_by_reading(text, things):
    "The answer to a question, from its words and the list of what is in the scene. None where it makes no sense."
    find = lambda phrase: [t for t in things if fits(t, described(phrase))]
    if text.startswith(('how many', 'what is the number')): return str(len(find(text.replace('how many', '').replace('can be seen', '').replace('does the picture show', ''))))
    for asked in ('colour', 'shape'):
        if re.match(f'(what|which) (is the )?{asked}', text):
            found = find(text)
            return found[0][asked] if len(found) == 1 else None
    for pattern, holds in RELATIONS:
        parts = re.match(rf'(?:is|can|does the picture show) (the .+?) (?:be seen )?(?:{pattern}) (the .+)\?', text)
        if parts and ' the ' in f' {parts[2]}':
            a, b = find(parts[1]), find(parts[2])
            return None if len(a) != 1 or len(b) != 1 or a[0] is b[0] else 'yes' if holds(a[0], b[0]) else 'no'
    return 'yes' if find(text) else 'no'


def things_of(scenes):
    column, row = scenes.cell
    return [[o | dict(column=int(column[i,k]), row=int(row[i,k])) for k, o in enumerate(r['objects'])] for i, r in enumerate(scene_records(scenes))]


@pytest.mark.parametrize('seed', [0, 1])
def test_answers_are_those_of_an_independent_reader(seed):
    scenes = make_scenes(1500, seed=seed, split='val')
    questions = make_questions(scenes, 300, seed=seed)
    things = things_of(scenes)
    for i in range(len(questions)):
        assert answer_by_reading(questions.text[i], things[questions.image[i]]) == questions.answers[i][0], (questions.text[i], things[questions.image[i]])


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), shapes=st.integers(2, 5), colours=st.integers(2, 6), objects=st.integers(2, 4))
def test_each_text_is_balanced(seed, shapes, colours, objects):
    names = SceneConfig()
    world = SceneConfig(shapes=names.shapes[:shapes], colours=names.colours[:colours], max_objects=objects)
    questions = make_questions(make_scenes(600, seed=seed, config=world), 60, seed=seed)
    groups = defaultdict(list)
    for i, g in enumerate(questions.group): groups[g].append(i)
    for rows in groups.values():
        assert len({questions.text[i] for i in rows}) == 1 and len(set(questions.image[rows])) == len(rows)
        answers, kind = [questions.answers[i][0] for i in rows], questions.kind[rows[0]]
        assert len(set(answers)) == len(answers) >= 2
        assert kind == 'count' and answers == [str(n) for n in range(len(answers))] or len(answers) == dict(existence=2, relation=2, colour=colours, shape=shapes).get(kind, -1)
    assert all((questions.kind == k).sum() >= 60 for k in QUESTION_KINDS)
    reached = accuracy_by_kind(questions, blind_answers(questions, questions))                    # even where the texts themselves have been seen
    limit = dict(existence=50, relation=50, colour=100/colours, shape=100/shapes, count=100/3)
    for kind, most in limit.items():
        texts = defaultdict(list)
        for i in np.flatnonzero(questions.kind == kind): texts[questions.text[i]].append(questions.answers[i][0])
        assert reached[kind] <= most + 1e-6, (kind, reached[kind])


def test_worlds_of_one_split_never_meet():
    config = SceneConfig(max_objects=3)
    train, test = (make_scenes(400, seed=0, config=config, split=s) for s in ('train', 'test'))
    a, b = make_questions(train, 40, block=400), make_questions(test, 40, block=400)
    assert a.text != b.text and len(a.image_ids) == 400


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab ,.'-1239?!/the one two none dont", max_size=24))
def test_normal_form(text):
    once = normalise_answer(text)
    assert once == ' '.join(once.split()) and not any(w in ('a', 'an', 'the', 'one', 'none', 'ten') for w in once.split())
    assert not set(once) & set(';/[]"{}()=+\\_-><@`,?!')


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(['yes', 'no', 'two', '2', 'Maybe.', 'a dog']), min_size=10, max_size=10), st.sampled_from(['yes', 'two', 'dog', 'a dog', 'Maybe']))
def test_official_accuracy_is_the_leave_one_out_mean(answers, prediction):
    given, said = judged_answers(tuple(answers)), normalise_answer(prediction)
    sets = [sum(a == said for j, a in enumerate(given) if j != i) for i in range(10)]
    assert abs(vqa_accuracy(prediction, tuple(answers)) - sum(min(1, n/3) for n in sets)/10) < 1e-9
    assert abs(sum(answer_targets(tuple(answers)).values()) - 1) < 1e-9 and max(answer_scores(tuple(answers)).values()) <= 1


def small_vqa(folder, n=4):
    questions = Questions(['what is it?', 'is it red?', 'how many?', 'why?'][:n], np.array([0, 1, 1, 0][:n]), [('cat',)*10, ('yes',)*7 + ('no',)*3, ('2',)*10, ('because',)*10][:n], np.array(['other']*n),
                          [7, 8, 9, 10][:n], [42, 139], np.zeros((2, 16, 16, 3), np.uint8))
    return questions, write_vqa(questions, folder, 'val2014')


def test_vqa_round_trip(tmp_path):
    questions, (path, notes) = small_vqa(tmp_path)
    back = read_vqa(path, notes, tmp_path/'val2014')
    assert (back.text, back.answers, back.question_ids, [back.image_ids[i] for i in back.image]) == (questions.text, questions.answers, questions.question_ids, [questions.image_ids[i] for i in questions.image])
    assert back.kind.tolist() == ['other', 'yes/no', 'number', 'other'] and back.load_image(1).size == (16, 16)
    assert read_vqa(path).answers == [()]*4 and answer_vocabulary(back, 1) == ['2', 'because', 'cat', 'yes']
    again = read_vqa(*write_vqa(back, tmp_path/'again', 'val2014'))
    assert again.text == back.text and again.answers == back.answers
    for split in ('test2015', 'test-dev2015'):                             # both test splits share their pictures
        data = json.loads(path.read_text()) | dict(data_subtype=split)
        (tmp_path/'q.json').write_text(json.dumps(data)); (tmp_path/'pictures').mkdir(exist_ok=True)
        for i in (42, 139): (tmp_path/'pictures'/f'COCO_test2015_{i:012d}.jpg').write_bytes((tmp_path/'val2014'/f'COCO_val2014_{i:012d}.jpg').read_bytes())
        assert len(read_vqa(tmp_path/'q.json', images=tmp_path/'pictures')) == 4


DAMAGE = {'question': [lambda r: r[1].pop('question'), lambda r: r[1].update(question='  '), lambda r: r[1].update(question_id='8'), lambda r: r[1].update(question_id=7), lambda r: r[1].update(image_id=None),
                       lambda r: r.__setitem__(1, 'text'), lambda r: r[1].update(question_id=True)],
          'annotation': [lambda r: r.pop(1), lambda r: r[1].update(answers=[]), lambda r: r[1].update(answers=[dict(answer=3)]), lambda r: r[1].update(image_id=42), lambda r: r[1].pop('answers'),
                         lambda r: r[1].update(question_id=99)]}


@pytest.mark.parametrize('where,change', [(w, c) for w, cs in DAMAGE.items() for c in cs])
def test_damaged_rows_are_named_or_left_out(tmp_path, where, change):
    _, files = small_vqa(tmp_path)
    path, key = (files[0], 'questions') if where == 'question' else (files[1], 'annotations')
    data = json.loads(path.read_text()); change(data[key]); path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=re.escape(path.name) + '|annotation'): read_vqa(*files)
    left = read_vqa(*files, on_error='skip')
    assert len(left) == 3 and len(left.problems) >= 1 and 8 not in left.question_ids


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"questions": 3}', 'null', '\xff'])
def test_damaged_files_are_refused(tmp_path, content):
    _, files = small_vqa(tmp_path)
    for path in files:
        kept = path.read_bytes(); path.write_bytes(content.encode('latin-1'))
        with pytest.raises(DataError): read_vqa(*files, on_error='skip')
        path.write_bytes(kept)


def test_pictures_stay_in_their_folder(tmp_path):
    _, files = small_vqa(tmp_path)
    with pytest.raises(DataError, match='outside'): read_vqa(*files, images=tmp_path/'val2014', pattern='../../{id}.jpg')
    (tmp_path/'val2014'/'COCO_val2014_000000000042.jpg').unlink()
    with pytest.raises(DataError, match='fetch it'): read_vqa(*files, images=tmp_path/'val2014')
    assert read_vqa(*files, images=tmp_path/'val2014', on_error='skip').image_ids == [139]
    with pytest.raises(DataError, match='no such folder'): read_vqa(*files, images=tmp_path/'nowhere')


def test_nothing_left_is_an_error_even_when_rows_are_skipped(tmp_path):
    _, files = small_vqa(tmp_path)
    data = json.loads(files[0].read_text())
    for rows in ([], [3, 'x'], [dict(question_id=7)]):
        files[0].write_text(json.dumps(data | dict(questions=rows)))
        with pytest.raises(DataError, match='not one usable question'): read_vqa(files[0], on_error='skip')
    files[0].write_text(json.dumps(data)); files[1].write_text('{"annotations": []}')
    with pytest.raises(DataError, match='not one usable question.*no annotation of question_id 7'): read_vqa(*files, on_error='skip')
    for p in (tmp_path/'val2014').iterdir(): p.unlink()
    with pytest.raises(DataError, match='not one usable question.*fetch it'): read_vqa(files[0], images=tmp_path/'val2014', on_error='skip')


def test_each_damage_is_one_problem(tmp_path):
    "The annotation of a question that was left out is no second problem; a picture's link that leads away is one."
    _, files = small_vqa(tmp_path)
    data = json.loads(files[0].read_text()); data['questions'][1]['question'] = ' '; files[0].write_text(json.dumps(data))
    left = read_vqa(*files, on_error='skip')
    assert left.question_ids == [7, 9, 10] and left.problems.messages == [f"{files[0]}, question 1: 'question' is empty; mend or remove it"]
    picture = tmp_path/'val2014'/'COCO_val2014_000000000042.jpg'; picture.unlink(); picture.symlink_to(__file__)
    with pytest.raises(DataError, match='image 42.*leads outside'): read_vqa(*small_vqa(tmp_path/'b')[1], images=tmp_path/'val2014')
    left = read_vqa(files[0], images=tmp_path/'val2014', on_error='skip')
    assert left.image_ids == [139] and len(left.problems) == 2
    notes = json.loads(files[1].read_text()); notes['annotations'][0]['answer_type'] = ['other']; files[1].write_text(json.dumps(notes))
    data['questions'].pop(1); files[0].write_text(json.dumps(data))
    with pytest.raises(DataError, match="annotation 0: 'answer_type'"): read_vqa(*files)


def test_all_or_no_questions_are_annotated(tmp_path):
    mixed = Questions(['is it red?', 'why?', 'how?'], [0, 0, 0], [('yes',)*10, (), ()], ['a']*3, [7, 8, 9], [42])
    with pytest.raises(ValueError, match="question 8 .'why.'. has no answer.*2 of 3"): write_vqa(mixed, tmp_path)
    assert not list(tmp_path.iterdir())                                                          # refused before anything was written
    path, notes = write_vqa(mixed[[bool(a) for a in mixed.answers]], tmp_path/'labelled')
    assert read_vqa(path, notes).answers == [('yes',)*10]
    path, notes = write_vqa(mixed[1:], tmp_path/'bare', 'test2015')
    assert notes is None and read_vqa(path).answers == [(), ()] and not list((tmp_path/'bare').glob('*annotations*'))


def test_pictures_are_written_in_one_step(tmp_path, monkeypatch):
    "A picture that cannot be encoded or written leaves no part of a file, and the old one as it was."
    questions, (path, _) = small_vqa(tmp_path)
    picture = tmp_path/'val2014'/'COCO_val2014_000000000042.jpg'
    old, inode = picture.read_bytes(), picture.stat().st_ino
    small_vqa(tmp_path)
    assert picture.read_bytes() == old and picture.stat().st_ino != inode                        # another file, moved there
    def cut(*_): raise OSError('disk full')
    monkeypatch.setattr('os.fsync', cut)
    questions.images[:] = 255
    with pytest.raises(OSError, match='disk full'): write_vqa(questions, tmp_path, 'val2014')
    assert picture.read_bytes() == old and not [p for p in picture.parent.iterdir() if p.name.startswith('.')]


@pytest.mark.parametrize('split', ['val2014', 'test2015', 'test-dev2015'])
def test_pictures_are_found_again_in_every_split(tmp_path, split):
    questions, _ = small_vqa(tmp_path/'other')
    path, _ = write_vqa(questions, tmp_path, split)
    folder = next(p for p in tmp_path.iterdir() if p.is_dir() and p.name != 'other')
    assert len(read_vqa(path, images=folder)) == 4 and folder.name == ('val2014' if split == 'val2014' else 'test2015')


def test_empty_sets_of_questions(tmp_path):
    scenes = make_scenes(50, seed=0, config=SceneConfig(max_objects=2))
    none = make_questions(scenes, 0, image_size=16)
    assert len(none) == 0 == len(none[:0]) and none.form.shape == (0, 11) and len(none.image_ids) == 50 and scene_answers(scenes, none) == []
    assert '0 questions' in repr(none) and none.load_image(3).size == (16, 16)
    with pytest.raises(ValueError, match='no question to write'): write_vqa(none, tmp_path)
    with pytest.raises(ValueError, match='learns from answers'): blind_answers(none, none)
    with pytest.raises(ValueError, match='no answer is'): answer_vocabulary(none)
    with pytest.raises(ValueError, match='negative'): make_questions(scenes, -1)
    with pytest.raises(ValueError, match='too few'): make_questions(scenes[np.zeros(0, np.int64)], 4)
    assert blind_answers(make_questions(scenes, 4, kinds=('existence',)), none) == []


def test_result_files(tmp_path):
    questions, _ = small_vqa(tmp_path)
    answers = ['cat', 'yes', '2', 'so']
    path = write_results(tmp_path/'r.json', questions, answers)
    assert json.loads(path.read_text())[0] == dict(question_id=7, answer='cat') and read_results(path, questions) == answers
    assert accuracy_by_kind(questions, answers)['all'] == 75.
    with pytest.raises(ValueError): write_results(tmp_path/'r.json', questions, answers[:2])


@pytest.fixture(scope='module')
def small():
    names = ['yes', 'no', 'dark blue', 'dark red', 'plus sign', '2', 'dark']
    tokenizer = WordTokenizer.learn(['what colour is the circle', 'is there a red star', ' '.join(names)])
    seed_everything(3)
    model = AnswerModel.from_albef(AlbefModel(AlbefConfig(vocab_size=tokenizer.vocab_size))).double().eval()
    return model, tokenizer, names


def test_two_steps_equal_exhaustive(small):
    model, tokenizer, names = small
    images, texts = torch.randn(3, 512, generator=make_generator(0), dtype=torch.float64), tokenizer(['what colour is the circle', 'is there a red star', 'star'])
    every = model.rank_answers(images, texts, tokenizer(names), k=None)
    for rows in (1, 3, 1000):
        assert_close(model.rank_answers(images, texts, tokenizer(names), k=7, rows=rows), every)
    states = model.question_states(images, texts)
    for q, a in itertools.product(range(3), range(7)):
        one = -model.answer_nll(states[q:q+1], texts['attention_mask'][q:q+1], tokenizer([names[a]]))
        assert_close(every.log_likelihood[q][every.index[q] == a], one)
    part = model.rank_answers(images, texts, tokenizer(names), k=4)
    assert part.index.shape == (3, 4) and (part.log_likelihood.diff(dim=1) <= 0).all()


def test_gradient_of_the_loss(small):
    model, tokenizer, names = small
    images, texts = torch.randn(2, 512, generator=make_generator(0), dtype=torch.float64), tokenizer(['is there a red star', 'star'])
    states, answers = model.question_states(images, texts).detach().requires_grad_(), tokenizer(['dark blue', 'no'])
    assert torch.autograd.gradcheck(lambda s: (model.answer_nll(s, texts['attention_mask'], answers) * torch.tensor([.3, .7])).sum(), (states,), fast_mode=True)


def test_masked_answers_leave_no_trace(small):
    model, tokenizer, names = small
    questions = Questions(['is there a red star', 'what colour is the circle'], np.array([0, 0]), [('yes',)*6 + ('dark blue',)*4, ('2',)*10], np.array(['a', 'b']), [0, 1], [5])
    images = TensorSet(torch.randn(1, 512, generator=make_generator(0), dtype=torch.float64), torch.zeros(0, 1), np.zeros(0))
    batch = QuestionSet(questions, tokenizer, images).batch([0, 1])
    loss = answer_objective(model, batch, 0)[0]
    batch.texts['answers'][1,1:] = 1; batch.texts['answer_mask'][1,1:] = 1                      # what has weight zero may be anything
    assert_close(answer_objective(model, batch, 0)[0], loss)
    alone = [answer_objective(model, QuestionSet(questions, tokenizer, images).batch([i]), 0)[0] for i in (0, 1)]
    assert_close(loss, sum(alone) / 2)


def test_image_groups_cover_the_set():
    image = np.repeat(np.arange(10), 7)
    class Rows:
        caption_image = image
        def __len__(self): return len(image)
    order = ImageGroups(Rows(), 10, 5, seed=0).order(0)
    assert order.shape == (7, 10) and sorted(order.ravel()) == list(range(70))
    assert max(len(set(image[row])) for row in order) <= 4
    with pytest.raises(ValueError, match='more than'): ImageGroups(Rows(), 80, 5)


def test_resumed_lessons_ask_the_same_questions():
    kinds = np.repeat(['colour', 'count', 'relation'], 40)
    class Rows:
        caption_image = np.arange(120) % 30
        def __len__(self): return 120
        def batch(self, index, epoch): return index.tolist(), epoch
    pick = lambda *names: np.flatnonzero(np.isin(kinds, names))
    make = lambda: ImageGroups(Rows(), 8, 2, seed=3, lessons=[(pick('colour'), 7), (pick('colour', 'count'), 11)])
    whole = list(itertools.islice(make()(0), 60))
    assert all({kinds[i] for i in b} <= known for (b, _), known in zip(whole, [{'colour'}]*7 + [{'colour', 'count'}]*11 + [set(kinds)]*42))
    for start in (1, 6, 7, 12, 18, 19, 40): assert list(itertools.islice(make()(start), 5)) == whole[start:start + 5]


def test_answers_of_other_scenes():
    config = SceneConfig(max_objects=3)
    scenes, others = (make_scenes(200, seed=s, config=config) for s in (0, 1))
    questions = make_questions(scenes, 20, block=200)
    assert scene_answers(scenes, questions) == [a for (a,) in questions.answers]
    things = things_of(others)
    assert scene_answers(others, questions) == [answer_by_reading(t, things[i]) for t, i in zip(questions.text, questions.image)]
    part = questions[::7]
    assert scene_answers(scenes, part) == [a for (a,) in part.answers]
    with pytest.raises(ValueError, match='not made about'): scene_answers(scenes[:5], questions)


def test_answering_is_the_same_whatever_the_batch(small):
    model, tokenizer, names = small
    scenes = make_scenes(200, seed=0, config=SceneConfig(max_objects=2))
    questions = make_questions(scenes, 12, kinds=('existence', 'count'), block=200)
    images = TensorSet(torch.randn(200, 512, generator=make_generator(0), dtype=torch.float64), torch.zeros(0, 1), np.zeros(0))
    whole, scores = answer_questions(model, tokenizer, questions, images, names, top=7, progress=False)
    part, other = answer_questions(model, tokenizer, questions, images, names, top=7, batch_size=3, progress=False)
    assert (whole == part).all() and np.allclose(scores, other, atol=1e-5)


def test_presets_are_the_papers():
    paper = ANSWERING['vqa']
    assert (paper.train.lr, paper.train.vision_lr, paper.train.weight_decay, paper.batch_size, paper.epochs, paper.candidates) == (2e-5, 5e-6, 0.05, 1024, 8, 128)
