"Questions, statements and documents from the command line: train, judge, summarise, and what is refused."
import json
import numpy as np
import pytest
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
