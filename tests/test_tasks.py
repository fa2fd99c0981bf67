"Questions, statements and documents from the command line: train, judge, summarise, and what is refused."
import json
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from vlwb.cli import app
from vlwb.data.world import SceneConfig, make_scenes, render

SMALL = ['--data', 'scenes:100', '--scale-steps', '0.003', '--batch-size', '8', '--device', 'cpu']


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('VLWB_CACHE', str(tmp_path_factory.mktemp('cache'))); yield


def vlwb(*words):
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception and not isinstance(result.exception, SystemExit) and not isinstance(result.exception, ValueError): raise result.exception
    return result


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One short run of each task, made once."
    folder = tmp_path_factory.mktemp('runs')
    said = {name: vlwb('train', '--preset', f'{name}-tiny', '--out', folder/name, '--from-scratch', *SMALL) for name in ('vqa', 'nlvr2', 'sita')}
    for name, result in said.items(): assert result.exit_code == 0, (name, result.output, result.exception)
    return folder, {name: result.output for name, result in said.items()}


@pytest.mark.parametrize('name, words', [('vqa', ('colour', 'blind', 'majority')), ('nlvr2', ('consistency', 'text alone', 'relation')), ('sita', ('ROUGE-L', 'captions right', 'lead-3'))])
def test_train_and_eval(runs, name, words):
    folder, said = runs
    for word in words: assert word in said[name]
    assert f'vlwb eval {folder/name} scenes:100' in said[name].replace('\n', '')
    judged = json.loads(vlwb('eval', folder/name, 'scenes:100', '--json').output)
    kept = json.loads((folder/name/'results.json').read_text())
    assert judged['split'] == kept['split'] == 'test'
    for key, figures in kept.items(): assert judged[key] == figures, key
    assert not list((folder/name).rglob('*.bin')) and not list((folder/name).rglob('*.pt')), 'no pickles'


def test_starts_from_a_run_and_keeps_its_words(runs, tmp_path):
    start = ['--preset', 'tiny-scenes', '--data', 'scenes:100', '--batch-size', '8', '--scale-steps', '0.01', '--stop-after', 'pretrain']
    assert vlwb('train', *start, '--out', tmp_path/'start').exit_code == 0
    result = vlwb('train', '--preset', 'vqa-tiny', '--start', tmp_path/'start', '--out', tmp_path/'answers', *SMALL)
    assert result.exit_code == 0, (result.output, result.exception)
    words = json.loads((tmp_path/'answers'/'tokenizer'/'word_tokenizer.json').read_text())['words']
    before = json.loads((tmp_path/'start'/'tokenizer'/'word_tokenizer.json').read_text())['words']
    assert words[:len(before)] == before and {'what', 'how', 'many'} <= set(words) - set(before)


def test_summarize_a_folder(runs, tmp_path):
    folder, _ = runs
    report = tmp_path/'report'; report.mkdir()
    for k, pixels in enumerate(render(make_scenes(2, seed=5, config=SceneConfig(max_objects=2)), 64)): Image.fromarray(pixels).save(report/f'{k}.png')
    (report/'report.txt').write_text('this report is about red things . the guide pointed at <script>alert(1)</script> a red circle . a child drew two blue squares .')
    result = vlwb('summarize', report, '--model', folder/'sita', '--out', tmp_path/'page.html')
    assert result.exit_code == 0, (result.output, result.exception)
    page = (tmp_path/'page.html').read_text()
    assert 'pseudo caption' in result.output and '<script>alert' not in page and '&lt;script&gt;alert' in page
    found = json.loads(vlwb('summarize', report, '--model', folder/'sita', '--out', tmp_path/'page.html', '--json').output)
    assert len(found['pictures']) == 2 and {'image', 'caption', 'score', 'chosen'} == set(found['pictures'][0])


@pytest.mark.parametrize('words, why', [
    (['train', '--preset', 'vqa-tiny', '--data', 'scenes:100', '--out', 'x'], 'starts from a pre-trained model'),
    (['train', '--preset', 'vqa-tiny', '--data', 'scenes:100', '--out', 'x', '--from-scratch', '--loss', 'srcl'], '--loss'),
    (['train', '--preset', 'nlvr2-tiny', '--data', 'nowhere', '--out', 'x', '--from-scratch'], 'no such folder'),
    (['eval', '{vqa}', 'scenes:100', '--rerank', '4'], '--rerank'),
    (['eval', '{nlvr2}', 'scenes:100', '--answers', 'a.json'], 'answers are written for vqa'),
    (['summarize', 'nowhere', '--model', '{sita}'], 'no such document'),
    (['summarize', '.', '--model', '{vqa}'], 'is a run of vqa')])
def test_bad_input_is_refused(runs, words, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'one.txt').write_text('a red circle .')
    result = vlwb(*(w.format(**{n: runs[0]/n for n in ('vqa', 'nlvr2', 'sita')}) for w in words))
    assert result.exit_code != 0 and why in (result.output + str(result.exception))
    assert not (tmp_path/'x').exists()


# From folders as they are published ---------------------------------------------------------------------------------------------------------------

COLOURS = dict(red=(200, 30, 30), green=(30, 160, 40), blue=(40, 60, 200), grey=(120, 120, 120))
NAMES = list(COLOURS)


def picture(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (32, 24 + k % 3), COLOURS[NAMES[k % 4]]).save(path)


def write_vqa_folder(root):
    "VQA v2: questions and annotations of train2014 and val2014, questions alone of test2015 and of its part test-dev2015."
    for split, first, images in (('train2014', 1, 8), ('val2014', 100, 4), ('test2015', 200, 3), ('test-dev2015', 200, 2)):
        place = 'test2015' if 'test' in split else split
        asked, told = [], []
        for k in range(images):
            i = first + k
            picture(root/place/f'COCO_{place}_{i:012d}.jpg', k)
            for n, text in enumerate(('What color is the picture?', f'Is it {NAMES[k % 2]}?', 'How many colors are there?', 'Is this a beach?')):
                asked.append(dict(image_id=i, question=text, question_id=i*1000 + n))
                answer = (NAMES[k % 4], 'yes' if k % 4 == k % 2 else 'no', '1', 'no')[n]
                told.append(dict(question_id=i*1000 + n, image_id=i, question_type=text[:8].lower(), answer_type=('other', 'yes/no', 'number', 'yes/no')[n], multiple_choice_answer=answer,
                                 answers=[dict(answer_id=a + 1, answer=answer if a < 7 else 'a colour', answer_confidence='yes') for a in range(10)]))
        about = dict(info={}, license={}, data_type='mscoco', data_subtype=split)
        (root/f'v2_OpenEnded_mscoco_{split}_questions.json').write_text(json.dumps(about | dict(task_type='Open-Ended', questions=asked)))
        if 'test' not in split: (root/f'v2_mscoco_{split}_annotations.json').write_text(json.dumps(about | dict(annotations=told)))


def write_nlvr2_folder(root):
    "NLVR2: JSON lines; pictures of train in numbered folders, those of dev and test1 beside each other."
    for split, name, number, pairs in (('train', 'train', 10, 8), ('dev', 'dev', 850, 4), ('test1', 'test1', 7, 4)):
        rows = []
        for p in range(pairs):                                                     # two pairs of pictures for each sentence
            name_of = f'{split}-{number + p//2}-{p % 2}'
            for side in (0, 1): picture(root/'images'/split/('55' if split == 'train' else '.')/f'{name_of}-img{side}.png', p + side)
            for s, (text, label) in enumerate(((f'One image is {NAMES[p // 2]}.', 'True'), ('Both images are red.', 'False'))):
                rows.append(dict(identifier=f'{name_of}-{s}', sentence=text, label=label, synset='square', left_url='http://x/l.jpg', right_url='http://x/r.jpg') | (dict(directory=55) if split == 'train' else {}))
        (root/f'{name}.json').write_text(''.join(json.dumps(r) + '\n' for r in rows))


def write_msmo_folder(root):
    "MSMO: articles, pictures by article and number, and which of the test set's belong to the summary."
    for split, documents in (('train_data', 8), ('valid_data', 3), ('test_data', 3)):
        (root/split/'article').mkdir(parents=True)
        for d in range(documents):
            name = f'{split[:2]}{d:03d}'
            for k in (1, 2): picture(root/split/'img'/f'{name}_{k}.jpg', d + k)
            body = f'Rain fell on the town . A picture of {NAMES[(d + 1) % 4]} paint was shown . The {NAMES[(d + 2) % 4]} wall was seen by all . Nobody was hurt .'
            (root/split/'article'/f'{name}.txt').write_text(f'@title\nNews {d}\n\n@body\n{body}\n\n@summary\nA picture of {NAMES[(d + 1) % 4]} paint was shown .\n\n@summary\nNobody was hurt .\n')
    (root/'test_data'/'image_annotation.txt').write_text('\n'.join(f'te{d:03d}_1.jpg' for d in range(3)) + '\n')


STEPS = dict(vqa=0.0007, nlvr2=0.0007, sita=0.012)                                 # four of answering and statements; four, two and six of the stages of sita


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp('published')
    for task, write in dict(vqa=write_vqa_folder, nlvr2=write_nlvr2_folder, sita=write_msmo_folder).items():
        (root/task).mkdir(); write(root/task)
    return root


def command(task, data, out): return 'train', '--preset', f'{task}-tiny', '--data', data, '--out', out, '--from-scratch', '--scale-steps', STEPS[task], '--batch-size', 8, '--checkpoint-every', 1, '--device', 'cpu'


@pytest.fixture(scope='module')
def whole(published, tmp_path_factory):
    "A run of each task, never interrupted; what it said."
    out = tmp_path_factory.mktemp('whole')
    said = {task: vlwb(*command(task, published/task, out/task)) for task in STEPS}
    for task, result in said.items(): assert result.exit_code == 0, (task, result.output, result.exception)
    return out, {task: result.output for task, result in said.items()}


def test_published_vqa(published, whole, tmp_path):
    "Trained on train2014, judged on val2014 as test has no answers; test-standard is answered whole, for the server."
    out, said = whole
    assert 'blind' in said['vqa'] and 'yes/no' in said['vqa']
    judged = json.loads(vlwb('eval', out/'vqa', published/'vqa', '--json', '--device', 'cpu').output)
    assert judged['split'] == 'val' and judged['questions'] == {'number': 4, 'other': 4, 'yes/no': 8} and 0 <= judged['model']['all'] <= 100
    assert set(json.loads((out/'vqa'/'vocabulary.json').read_text())) == {*NAMES, 'yes', 'no', '1'}                  # the most frequent answer of each question
    result = vlwb('eval', out/'vqa', published/'vqa', '--split', 'test', '--answers', tmp_path/'answers.json')
    rows = json.loads((tmp_path/'answers.json').read_text())
    assert '12 answers of split test' in result.output and [r['question_id'] for r in rows] == [i*1000 + n for i in (200, 201, 202) for n in range(4)] and all(r['answer'] for r in rows)


def test_published_nlvr2(published, whole):
    "Trained on train.json, judged on test1.json and, when asked, on dev.json."
    out, said = whole
    assert 'consistency' in said['nlvr2'] and 'text alone' in said['nlvr2']
    judged = {split: json.loads(vlwb('eval', out/'nlvr2', published/'nlvr2', '--split', split, '--json').output) for split in ('test', 'val')}
    assert judged['test']['split'] == 'test' and judged['val']['model']['statements'] == 8 and judged['val']['majority']['accuracy'] == 50.


def test_published_msmo(published, whole, tmp_path):
    "Trained on train_data, judged on test_data with its reference images; an article and its pictures are summarised."
    out, said = whole
    assert 'ROUGE-L' in said['sita'] and 'lead-3' in said['sita']
    judged = json.loads(vlwb('eval', out/'sita', published/'sita', '--json').output)
    assert judged['split'] == 'test' and judged['random picture']['IP'] == 50. and judged['lead-3, first picture']['IP'] == 100.
    document = tmp_path/'document'; document.mkdir()
    (document/'text.txt').write_text('Rain fell on the town . A picture of red paint was shown . Nobody was hurt .')
    for k in range(3): picture(document/f'{k}.jpg', k)
    result = vlwb('summarize', document, '--model', out/'sita', '--out', tmp_path/'page.html', '--json', '--device', 'cpu')
    assert [p['image'] for p in json.loads(result.output)['pictures']] == ['0.jpg', '1.jpg', '2.jpg']
    assert '<html' in (tmp_path/'page.html').read_text()


def weights(folder):
    from safetensors.torch import load_file
    return {p.relative_to(folder): load_file(p) for p in folder.rglob('*.safetensors')}


@pytest.mark.parametrize('task, cuts', [('vqa', [3]), ('nlvr2', [2]), ('sita', [3, 8])])
def test_cut_and_resumed_is_the_uninterrupted_run(published, whole, task, cuts, tmp_path, monkeypatch):
    "Stopped in the middle of a step, sita in its alignment and again in its summaries: the same weights, log and figures bit for bit."
    import vlwb.train.loop as loop
    step, count = loop.train_step, [0]
    class Cut(Exception): pass
    def counted(*arguments):
        count[0] += 1
        if cuts and count[0] == cuts[0]: raise Cut
        return step(*arguments)
    monkeypatch.setattr(loop, 'train_step', counted)
    while cuts:
        with pytest.raises(Cut): vlwb(*command(task, published/task, tmp_path/'run'))
        assert 'not finished' in str(vlwb('eval', tmp_path/'run', published/task).exception)
        cuts, count[0] = cuts[1:], 0
    assert vlwb(*command(task, published/task, tmp_path/'run')).exit_code == 0 and count[0] < (12 if task == 'sita' else 4)
    one, other = weights(whole[0]/task), weights(tmp_path/'run')
    assert one.keys() == other.keys() and len(one) >= 2
    for name in one: assert one[name].keys() == other[name].keys() and all(torch.equal(one[name][k], other[name][k]) for k in one[name]), name
    logs = [[{k: v for k, v in json.loads(line).items() if k != 'seconds'} for p in sorted(run.rglob('log.jsonl')) for line in p.read_text().splitlines()] for run in (whole[0]/task, tmp_path/'run')]
    assert logs[0] == logs[1] and (whole[0]/task/'results.json').read_text() == (tmp_path/'run'/'results.json').read_text()


def rewrite(path, old, new):
    text = path.read_text(); assert old in text
    path.write_text(text.replace(old, new, 1))


CHANGES = dict(vqa=('v2_mscoco_train2014_annotations.json', '"answer": "red"', '"answer": "pink"'), nlvr2=('train.json', '"label": "True"', '"label": "False"'), sita=('train_data/article/tr000.txt', '@summary\nNobody', '@summary\nEverybody'))


@pytest.mark.parametrize('task', STEPS)
def test_changed_answers_are_another_run(published, whole, task, tmp_path):
    "One answer, label or summary is another: the folder is refused before anything is trained, and nothing in it changes."
    import shutil
    shutil.copytree(published/task, tmp_path/'data'); shutil.copytree(whole[0]/task, tmp_path/'run')
    again = vlwb(*command(task, tmp_path/'data', tmp_path/'run'))
    assert again.exit_code == 0, again.exception                                   # the same data in another place are the same
    name, old, new = CHANGES[task]
    rewrite(tmp_path/'data'/name, old, new)
    before = {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}
    assert 'another run: identity differ' in str(vlwb(*command(task, tmp_path/'data', tmp_path/'run')).exception)
    assert {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()} == before


def test_a_run_comes_back_with_its_own_settings(whole):
    "What was changed on the command line, or since in the preset of that name, does not change what a folder holds."
    from vlwb.tasks import TASKS, changed_task, load_task
    for task in STEPS:
        kept = load_task(whole[0]/task).preset
        assert kept == changed_task(f'{task}-tiny', STEPS[task], 8, 0, 'cpu', 1) != TASKS[task][f'{task}-tiny']


def test_damaged_settings_are_told(whole, tmp_path):
    import shutil
    from vlwb.core import DataError
    from vlwb.tasks import load_task
    shutil.copytree(whole[0]/'vqa', tmp_path/'run')
    rewrite(tmp_path/'run'/'vlwb.json', '"per_image"', '"of_old"')
    with pytest.raises(DataError, match='of_old.*train it again'): load_task(tmp_path/'run')


def test_the_vocabulary_stands_before_the_model(published, tmp_path, monkeypatch):
    "A run that was killed while its model was written has a vocabulary already."
    from vlwb.models.answering import AnswerModel
    class Killed(Exception): pass
    def killed(*a): raise Killed
    monkeypatch.setattr(AnswerModel, 'save_pretrained', killed)
    with pytest.raises(Killed): vlwb(*command('vqa', published/'vqa', tmp_path/'run'))
    assert (tmp_path/'run'/'vocabulary.json').exists() and not (tmp_path/'run'/'model'/'model.safetensors').exists()


# The dry run --------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('task, words', [('vqa', ['questions', 'answering', 'decoder']), ('nlvr2', ['statements', 'looks', 'gradients']), ('sita', ['documents', 'sentences', 'alignment', 'short documents', 'summaries', 'other models'])])
def test_dry_run_of_a_task(published, task, words, tmp_path, monkeypatch):
    "Tables on data, parameters, memory and time; nothing is written anywhere."
    monkeypatch.setenv('COLUMNS', '120'); monkeypatch.chdir(tmp_path)
    before = sorted(p for p in published.rglob('*'))
    result = vlwb('train', '--preset', f'{task}-tiny', '--data', published/task, '--out', tmp_path/'run', '--batch-size', 8, '--dry-run', '--device', 'cpu')
    assert result.exit_code == 0, (result.output, result.exception)
    for word in ['labelled', 'tokens, median', 'activations', 'a step', 'All stages together', 'Everything fits', 'no start is named', *words]: assert word in result.output, word
    assert sorted(p for p in published.rglob('*')) == before and not list(tmp_path.iterdir())


def test_dry_run_measures_what_training_takes(published, monkeypatch):
    "Steps, batch and first loss are those of the run; a whole batch was measured; a frozen image encoder has no gradients."
    from dataclasses import replace
    from vlwb.tasks import TASKS, rehearse_task
    monkeypatch.setitem(TASKS['nlvr2'], 'nlvr2', replace(TASKS['nlvr2']['nlvr2'], image_size=64))                 # 384 takes its time
    found = rehearse_task('nlvr2-tiny', published/'nlvr2', device='cpu', batch_size=16, from_scratch=True).found
    stage, = found.stages
    assert (stage['steps'], stage['batch'], stage['measured_on']) == (5500, 8, (4, 8))                               # 16 statements about 8 sentences
    assert 0 < stage['memory']['gradients'] < stage['memory']['parameters'] == 4*sum(found.parameters.values()) and found.parameters['albef.vision'] > 0
    assert abs(stage['loss'] - 0.69) < 0.3 and stage['seconds'] > 5500*stage['seconds_a_step'] > 0
    epochs = rehearse_task('nlvr2', published/'nlvr2', device='cpu', batch_size=4, from_scratch=True, scale=2).found.stages[0]
    assert epochs['steps'] == round(2*15*16/4) and epochs['memory']['gradients'] == epochs['memory']['parameters']


@pytest.mark.parametrize('task, change, why', [
    ('vqa', lambda f: (f/'v2_mscoco_train2014_annotations.json').unlink(), 'without answers'),
    ('vqa', lambda f: (f/'train2014'/'COCO_train2014_000000000001.jpg').write_bytes(b'no picture'), '000000000001'),
    ('nlvr2', lambda f: (f/'train.json').write_text((f/'train.json').read_text().replace('"label"', '"was"')), 'no statement is known'),
    ('sita', lambda f: [p.write_text(p.read_text().split('@summary')[0]) for p in (f/'train_data'/'article').iterdir()], 'no document has a summary')])
def test_dry_run_says_what_does_not_work(published, task, change, why, tmp_path):
    import shutil
    shutil.copytree(published/task, tmp_path/'data'); change(tmp_path/'data')
    result = vlwb('train', '--preset', f'{task}-tiny', '--data', tmp_path/'data', '--out', tmp_path/'run', '--batch-size', 8, '--from-scratch', '--dry-run', '--device', 'cpu')
    said = ' '.join(result.output.split())
    assert result.exit_code == 1 and 'Problem: ' in said and why in said and 'Everything fits' not in said and not (tmp_path/'run').exists(), result.output


def test_dry_run_of_large_batches_and_missing_extras(published, monkeypatch):
    "A batch that cannot be filled, ROUGE that is not installed, images that are judged on too, memory that is not there."
    import sys
    import vlwb.tasks as tasks
    assert 'cannot be filled from 32 questions' in ' '.join(tasks.rehearse_task('vqa-tiny', published/'vqa', device='cpu', from_scratch=True).found.problems)
    monkeypatch.setitem(sys.modules, 'rouge_score.rouge_scorer', None)
    assert any('vlwb[summaries]' in p for p in tasks.rehearse_task('sita-tiny', published/'sita', device='cpu', from_scratch=True).found.problems)
    monkeypatch.setattr(tasks, 'available_memory', lambda device: 1000)
    both = tasks.read_task('vqa', published/'vqa')
    monkeypatch.setattr(tasks, 'read_task', lambda *a: both | dict(val=both['train']))
    problems = tasks.rehearse_task('vqa-tiny', published/'vqa', device='cpu', batch_size=8, from_scratch=True).found.problems
    assert any('8 of its images are also in val' in p for p in problems) and any('needs about' in p for p in problems)


def test_dry_run_leaves_out_bad_rows_when_asked(published, tmp_path):
    import shutil
    shutil.copytree(published/'nlvr2', tmp_path/'data')
    (tmp_path/'data'/'train.json').write_text((tmp_path/'data'/'train.json').read_text() + '{"sentence": "no identifier"}\n')
    common = 'train', '--preset', 'nlvr2-tiny', '--data', tmp_path/'data', '--batch-size', 8, '--from-scratch', '--dry-run', '--device', 'cpu'
    assert 'identifier' in str(vlwb(*common).exception) and '1 skipped' in vlwb(*common, '--skip-bad').output


# Pictures that are drawn anew ---------------------------------------------------------------------------------------------------------------------

def test_pictures_of_a_frozen_encoder_are_seen_whole(published):
    "Random crops are for pictures that are seen in every epoch anew; what is encoded once is encoded as it is judged."
    from dataclasses import replace
    from vlwb.tasks import TASKS, _learned_images, _ready
    ready = _ready('nlvr2-tiny', published/'nlvr2', None, None, 1., 8, 0, 'cpu', None, 'raise')
    crop = replace(ready.config, augment='crop')
    still, drawn = (_learned_images(ready.begun, ready.data, replace(crop, train_vision=v)) for v in (False, True))
    at = lambda images, epoch: images.images_at([0, 1], epoch)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(still.source.images[0])
    assert torch.equal(at(still, 0), at(still, 1)) and torch.equal(at(still, 0), at(ready.data.images['train'], 0)) and not torch.equal(at(drawn, 0), at(drawn, 1))
    picture(still.source.images[0], 0)


def test_epochs_reach_the_pictures_of_documents():
    "A set that draws crops is told the epoch; one of tensors takes it and gives the same."
    from vlwb.data.documents import Documents
    from vlwb.data.inputs import TensorImages, WordTokenizer
    from vlwb.train.alignment import AlignmentSet, take_images
    class Drawn:
        def images_at(self, index, epoch=0): return torch.full((len(index), 2), float(epoch))
    learned = AlignmentSet(Documents(['a'], [['x .', 'y .']], [np.array([0])], ['p'], summary=[['x .']]), Drawn(), WordTokenizer.learn(['x . y .']), [np.array([[1., 0.]], np.float32)])
    assert take_images(Drawn(), [0, 1], 3).tolist() == [[3., 3.]]*2 and learned.batch([0], 5).images.tolist() == [[5., 5.]]
    assert torch.equal(take_images(TensorImages(torch.eye(3)), [2], 4), torch.eye(3)[2:])


def test_a_document_without_pictures_is_summarised(whole, tmp_path):
    (tmp_path/'a.txt').write_text('Rain fell . Nobody was hurt .')
    result = vlwb('summarize', tmp_path, '--model', whole[0]/'sita', '--out', tmp_path/'a.html')
    assert result.exit_code == 0 and 'The page is' in result.output and (tmp_path/'a.html').exists()

# On an accelerator --------------------------------------------------------------------------------------------------------------------------------

FAR = torch.device('cuda', 0)


class Elsewhere(torch.overrides.TorchFunctionMode):
    "A second device that needs no hardware: tensors are marked as lying there, and no function may take tensors of both."
    def __init__(self): super().__init__(); self.mixed = 0
    far = staticmethod(lambda x: getattr(x, '_far', False))

    def place(self, x, far):
        if isinstance(x, torch.Tensor): x._far = far
        elif isinstance(x, (list, tuple)): [self.place(y, far) for y in x]
        return x

    def tensors(self, x):
        if isinstance(x, torch.Tensor): return [x]
        return [t for y in (x.values() if isinstance(x, dict) else x) for t in self.tensors(y)] if isinstance(x, (dict, list, tuple)) else []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs, wanted = getattr(func, '__name__', ''), dict(kwargs or {}), None
        if func == torch.Tensor.device.__get__: return FAR if self.far(args[0]) else func(*args)
        if kwargs.get('device') is not None: wanted = torch.device(kwargs.pop('device')).type == 'cuda'
        if name in ('to', 'cpu', 'cuda'):
            devices = [a for a in args[1:] if isinstance(a, (str, torch.device, torch.Tensor))]
            if devices: wanted = self.far(devices[0]) if isinstance(devices[0], torch.Tensor) else torch.device(devices[0]).type == 'cuda'
            types = [devices[0].dtype if isinstance(a, torch.Tensor) else a for a in args[1:] if not isinstance(a, (str, torch.device))]
            wanted = dict(cpu=False, cuda=True).get(name, self.far(args[0]) if wanted is None else wanted)
            return self.place(args[0].to(*types, **kwargs).clone() if types or kwargs else args[0].clone(), wanted)
        found = self.tensors(args) + self.tensors(kwargs)
        there, here = [x for x in found if self.far(x)], [x for x in found if not self.far(x) and x.ndim]
        if name in ('numpy', '__array__') and there: raise RuntimeError(f'{name} of a tensor that is not on the CPU')
        indexed = name in ('__getitem__', '__setitem__', 'index_put', 'copy_') and self.far(args[0])               # positions may come from the CPU
        if there and here and not indexed: raise RuntimeError(f'{name} of tensors on two devices: {[tuple(x.shape) for x in found]}')
        if wanted is not None and not there: kwargs['device'] = 'cpu'
        return self.place(func(*args, **kwargs), bool(there) if wanted is None else wanted)


def put(model, mode):
    parts = [model.retriever, model.aligner, model.summariser] if hasattr(model, 'retriever') else [model]
    for part in parts:
        for x in (*part.parameters(), *part.buffers()): mode.place(x, True)


@pytest.mark.parametrize('task', STEPS)
def test_judging_brings_its_inputs_to_the_model(published, whole, task):
    "A model on another device than its inputs, with tensors told apart by a mark: the same figures, and no function meets tensors of both."
    from vlwb.tasks import Begun, _judge, load_task, read_task, see
    run = load_task(whole[0]/task)
    parts = {r: p for r, p in read_task(task, published/task).items() if r != 'test' or task != 'vqa'}
    albef = run.model.retriever if task == 'sita' else run.model.albef
    data, role = see(task, parts, {}, Begun(albef, run.tokenizer, run.inputs, None)), 'val' if task == 'vqa' else 'test'
    here = _judge(run, data, role, False)
    with Elsewhere() as mode:
        put(run.model, mode)
        assert next(albef.parameters()).device == FAR
        there = _judge(run, data, role, False)
        with pytest.raises(RuntimeError, match='two devices'): albef.encode_image(data.images[role].images_at([0]))
    assert json.dumps(here) == json.dumps(there)


def test_the_device_is_told(published, whole, tmp_path, monkeypatch):
    "The option reaches the model, of both commands; it is for tasks alone; auto is what it is without."
    import vlwb.tasks as tasks
    asked, pick = [], tasks.pick_device
    monkeypatch.setattr(tasks, 'pick_device', lambda name: asked.append(name) or pick('cpu'))
    (tmp_path/'a.txt').write_text('Rain fell . Nobody was hurt .')
    vlwb('eval', whole[0]/'nlvr2', published/'nlvr2', '--json'); vlwb('eval', whole[0]/'nlvr2', published/'nlvr2', '--json', '--device', 'cuda:1')
    vlwb('summarize', tmp_path, '--model', whole[0]/'sita', '--out', tmp_path/'a.html'); vlwb('summarize', tmp_path, '--model', whole[0]/'sita', '--out', tmp_path/'a.html', '--device', 'cuda')
    assert asked == ['auto', 'cuda:1', 'auto', 'cuda']
    assert '--device is for a run of a task' in str(vlwb('eval', tmp_path, 'pairs.jsonl', '--device', 'cpu').exception)
