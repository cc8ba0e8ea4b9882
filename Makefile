# The two commands of the README, and the checks. Everything else is plain DVC inside .venv.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
BROWSER := .venv/.browser
BENCH := .venv/.bench
RAY := .venv/.ray
# Stages run `python`: the venv's, whatever the shell has.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.DEFAULT_GOAL := help
.PHONY: help setup check submission test test-slow test-browser lint search compare table serve bench ray

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): requirements.txt requirements-app.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-app.txt -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

setup: $(STAMP)  ## make .venv from requirements.txt, if needed

check: $(STAMP)  ## check params.yaml
	@img2prompt check

submission: check  ## run the pipeline to outputs/submission.csv and show the scores
	dvc repro
	@cat outputs/scores/scores.md
	@echo "The run, to look at: outputs/report/index.html"

test: check  ## run the tests, but for the slow ones and those in a browser
	python -m pytest -m "not slow and not browser"

test-slow: check  ## run the slow tests
	python -m pytest -m slow

$(BROWSER): requirements-browser.txt $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-browser.txt -c constraints.txt
	touch $@

test-browser: check $(BROWSER)  ## run the tests that open pages in chromium
	python -m pytest -m browser

$(RAY): requirements-ray.txt $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-ray.txt -c constraints.txt
	touch $@

ray: $(RAY)  ## install Ray, for IMG2PROMPT_ENGINE=ray: docs/cluster.md

$(BENCH): requirements-bench.txt $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt -c constraints.txt
	touch $@

bench: check $(BENCH)  ## every stage against what people use: docs/speed.md; ARGS='--stages dedup --rows 10000 --runs 5'
	python -m bench.run --docs $(ARGS)

lint: $(STAMP)  ## check the style
	ruff check
	ruff format --check

search: check  ## find Model A's epochs and rates on inner splits of the training folds
	img2prompt search $(ARGS)

A ?= HEAD
B ?= workspace
compare: check  ## A=base B='exp1 exp2': experiments picture by picture (or git revisions, or workspace)
	img2prompt compare $(A) $(B) $(ARGS)

table: check  ## the paper's table on your data; SET='knn.k=50 ...' sets params for every row
	img2prompt table $(SET)

serve: check  ## a page to try the last run; ARGS='--bundle DIR --port 8080'
	img2prompt serve $(ARGS)
