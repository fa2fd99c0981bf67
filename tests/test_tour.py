"The guided tour in JupyterLab and as voila's page, in miniature; and the command that opens it."
import json, shutil, subprocess, sys
from pathlib import Path
import pytest
from vlwb.lab import lab_command

TOUR = Path(__file__).resolve().parent.parent/'nbs'/'index.ipynb'
VIEWS = '.vlwb-matrix canvas', '.vlwb-regulation', '.vlwb-studio', '.vlwb-desk', '.vlwb-monitor', '.vlwb-retrieval', '.vlwb-document'


def quick_copy(folder, name):
    "The tour as it is, behind a cell that makes it a miniature."
    notebook = json.loads(TOUR.read_text())
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code': cell['outputs'], cell['execution_count'] = [], None
    quick = dict(cell_type='code', execution_count=None, id='quick', metadata={}, outputs=[], source="import os; os.environ['VLWB_QUICK'] = '1'")
    (folder/name).write_text(json.dumps(notebook | dict(cells=[quick, *notebook['cells']])))


@pytest.mark.parametrize('where', ['lab', 'voila'])
def test_the_tour_shows_every_view_and_answers(where, chromium, request, shots):
    server = request.getfixturevalue(f'{where}_server')
    quick_copy(server.notebooks, f'tour-{where}.ipynb')
    page = chromium.open_file(server, f'tour-{where}.ipynb', size=(1300, 1600), timeout=240)
    try:
        p = page.page
        for view in VIEWS: p.locator(view).first.wait_for(state='attached')
        canvas = p.locator('.vlwb-matrix canvas').first
        canvas.scroll_into_view_if_needed(); p.locator('.vlwb-matrix canvas[data-whole="1"]').first.wait_for()
        before = page.pixels('.vlwb-matrix canvas')
        box = canvas.bounding_box(); p.mouse.click(box['x'] + box['width']/2, box['y'] + box['height']/2)
        p.locator('.vlwb-card', has_text='similarity').first.wait_for()
        page.wait_pixels('.vlwb-matrix canvas', before)                       # the chosen pair is framed
        if where == 'lab': assert page.ask('explorer.state.cell') == [32, 32]
        p.locator('.vlwb-document .vlwb-card').nth(1).scroll_into_view_if_needed(); p.locator('.vlwb-document .vlwb-card').nth(1).click(); p.locator('.vlwb-facts', has_text='Sentences for image 2').wait_for()
        p.locator('.vlwb-document img.vlwb-photo').first.wait_for()
        p.locator('.vlwb-studio canvas').first.wait_for()                         # jupyter-scatter's style sheet stays inside the studio
        assert p.locator('.vlwb-monitor h3').first.evaluate('e => getComputedStyle(e).fontWeight') == '700'
        for n, view in enumerate(VIEWS):
            p.locator(view).first.scroll_into_view_if_needed(); p.wait_for_timeout(400); page.shot(shots/f'tour-{where}-{n}.png')
        assert not page.complaints()
    finally:
        page.close(); server.shutdown_kernels()


def test_vlwb_lab_says_what_it_would_run_and_keeps_a_copy(tmp_path):
    vlwb = shutil.which('vlwb', path=f'{Path(sys.executable).parent}') or shutil.which('vlwb')
    run = lambda *more: subprocess.run([vlwb, 'lab', str(tmp_path/'work'), '--dry-run', *more], capture_output=True, text=True, timeout=120)
    said = run()
    assert said.returncode == 0 and 'jupyterlab' in said.stdout and 'vlwb_tour.ipynb' in said.stdout, said.stderr
    assert 'voila' in run('--app').stdout and not (tmp_path/'work').exists()       # a dry run writes nothing
    lab_command(tmp_path/'work')
    copy = tmp_path/'work'/'vlwb_tour.ipynb'
    assert json.loads(copy.read_text())['cells'][0]['source'][0].startswith('# A tour')
    copy.write_text('mine'); lab_command(tmp_path/'work', app=True)
    assert copy.read_text() == 'mine'
