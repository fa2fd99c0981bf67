"Fixtures of the real-browser tests. Write `page = lab(['cell', ...])` or `page = voila([...])` in a test; vlwb.bench.browser says what a page can do."
import os, re
from pathlib import Path
import pytest
from vlwb.bench import browser

CI = os.environ.get('CI', '').lower() in ('1', 'true')


def pytest_collection_modifyitems(items):
    "What drives a browser shares one process of pytest -n, so that nothing else draws while a test waits; every other file stays whole for its fixtures."
    for item in items:
        if 'chromium' in getattr(item, 'fixturenames', ()): item.add_marker('browser')
    drives = {item.path for item in items if item.get_closest_marker('browser')}
    for item in items:
        item.add_marker(pytest.mark.xdist_group('browser' if item.path in drives else item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "In CI nothing excuses a browser test."
    report = yield
    if CI and report.skipped and item.get_closest_marker('browser'):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = 'failed', f'CI=true, and a browser test was skipped. {reason}'
    if call.when == 'call': item.failed_in_call = report.failed
    return report


@pytest.fixture(scope='session')
def have_chromium():
    "Skips where there is no Chromium, or no playwright, and says what to install."
    if missing := browser.browser_missing(): pytest.skip(missing)


@pytest.fixture(scope='module')
def chromium(have_chromium):
    "One Chromium for the tests of a file; playwright's loop ends with it."
    with browser.Chromium() as chromium: yield chromium


@pytest.fixture(scope='session')
def lab_server(have_chromium, tmp_path_factory):
    with browser.Server('lab', tmp_path_factory.mktemp('lab')) as server: yield server


@pytest.fixture(scope='session')
def voila_server(have_chromium, tmp_path_factory):
    pytest.importorskip('voila', reason='the tests of the app need `pip install "vlwb[app]"`')
    with browser.Server('voila', tmp_path_factory.mktemp('voila')) as server: yield server


@pytest.fixture
def shots(request, tmp_path_factory):
    "The folder of the screenshots, outside git: VLWB_SHOTS, else pytest's own temporary folder."
    return Path(os.environ.get('VLWB_SHOTS') or tmp_path_factory.getbasetemp()/'shots')


def opener(request, chromium, server, shots):
    "Opens notebooks for one test; afterwards nothing that the pages said as an error is let pass."
    pages, name = [], re.sub(r'\W+', '-', request.node.name).strip('-')
    def open_page(cells, dark=False, **options):
        pages.append(chromium.open(server, cells, f'{server.kind}-{name}-{len(pages)}', dark, **options)); return pages[-1]
    open_page.shots, open_page.name, open_page.allow = shots, name, []   # regular expressions of errors that a test provokes
    yield open_page
    failed = getattr(request.node, 'failed_in_call', False)
    complaints = [c for page in pages for c in page.complaints(open_page.allow)]
    for i, page in enumerate(pages):
        if failed: page.shot(shots/f'{name}-{i}-failed.png')
        page.close()
    server.shutdown_kernels()
    assert not complaints, 'the page reported errors:\n' + '\n'.join(complaints)


@pytest.fixture
def lab(request, chromium, lab_server, shots): yield from opener(request, chromium, lab_server, shots)


@pytest.fixture
def voila(request, chromium, voila_server, shots): yield from opener(request, chromium, voila_server, shots)
