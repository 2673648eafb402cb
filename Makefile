# Experiments are targets: experiments/<method>/<setting>.yaml is `make <method>-<setting>`.
#   SEEDS="0 1 2"   one run for each seed
#   RUNS="a b"      run folders, or folders of them, for `make report`
#   ARGS="..."      appended to the command line, for example ARGS="--trainer.max_epochs 5"
PYTHON ?= python3
SEEDS ?= 0
RUNS ?=
ARGS ?=
RUN := .venv/bin/python -m experiments
SETTINGS := $(filter-out _%,$(patsubst experiments/%.yaml,%,$(wildcard experiments/*/*.yaml)))
TARGETS := $(subst /,-,$(SETTINGS))
COMPOSITIONS := $(patsubst %_gmm_std,%,$(filter heat-%_gmm_std,$(TARGETS)))
OVER_SEEDS = $(if $(word 2,$(SEEDS)),$(RUN) metrics $(foreach seed,$(SEEDS),$(or $(OOD_CHECKPOINTS),checkpoints)/$(subst -,/,$@)/seed$(seed)))

ifneq ($(and $(filter $(COMPOSITIONS),$(MAKECMDGOALS)),$(findstring --name,$(ARGS))),)
$(error $(MAKECMDGOALS) composes runs by the names of their seeds: give SEEDS, not --name)
endif

.DEFAULT_GOAL := help
.PHONY: help demo report evaluate heat-evaluate heat-toy features data-check test test-slow lint format bench completion clean $(TARGETS) $(COMPOSITIONS)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-28s %s\n", $$1, $$2}' Makefile
	@printf '  make %-28s %s\n' 'data-<name>' 'download a set of images, as data-check names it'
	@printf '  make %-28s %s\n' 'stages-<experiment>' 'test all kept checkpoints of a run, draw each metric over training'
	@printf '\nExperiments: fit, then test of the checkpoint that the method selects (SEEDS="0 1 2", ARGS="...")\n'
	@for target in $(TARGETS); do printf '  make %s\n' $$target; done
	@for target in $(COMPOSITIONS); do printf '  make %-28s %s\n' $$target "$${target}_el, _gmm and _gmm_std, then their compositions"; done

demo: .venv/installed ## train, evaluate and compare every method on scanned digits, without any download of data
	$(RUN) demo $(ARGS)

report: .venv/installed ## compare all runs, or RUNS="a b": a page, Markdown, LaTeX, CSV in checkpoints/report
	@$(RUN) report $(RUNS) $(ARGS)

$(TARGETS): .venv/installed
	@for seed in $(SEEDS); do \
		$(RUN) run --config experiments/$(subst -,/,$@).yaml --seed_everything $$seed $(ARGS) || exit 1; \
	done
	@$(OVER_SEEDS)

$(COMPOSITIONS): heat-%: heat-%_el heat-%_gmm heat-%_gmm_std
	@for seed in $(SEEDS); do \
		$(RUN) heat-evaluate --runs $(addsuffix /seed$$seed,$(subst -,/,$^)) --beta 0 -1 inf --overwrite true || exit 1; \
	done
	@$(OVER_SEEDS)

stages-%: .venv/installed
	@for seed in $(SEEDS); do \
		$(RUN) stages $(or $(OOD_CHECKPOINTS),checkpoints)/$(subst -,/,$*)/seed$$seed $(ARGS) || exit 1; \
	done

evaluate: .venv/installed ## score any network on any data with any scores, without a run: ARGS="--config ..."
	@$(RUN) evaluate $(ARGS)

heat-evaluate: .venv/installed ## score with trained runs of HEAT and their compositions: ARGS="--runs A B C --beta 0 -1 inf"
	@$(RUN) heat-evaluate $(ARGS)

heat-toy: .venv/installed ## train HEAT on points of the plane, measure and draw what it learns: ARGS="--seed 1"
	@$(RUN) heat-toy $(ARGS)

features: .venv/installed ## extract the features that an experiment caches, without training: ARGS="--config ..."
	@$(RUN) features $(ARGS)

data-check: .venv/installed ## list every set of images: there or not, complete or not, and how to get it
	@$(RUN) data check $(ARGS)

data-%: .venv/installed
	@$(RUN) data get $* $(ARGS)

test: .venv/installed ## run the tests, on two cores
	.venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/installed ## run the tests that take longer
	.venv/bin/python -m pytest -m slow $(ARGS)

lint: .venv/installed ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/installed ## let ruff format and mend
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/installed-bench ## measure ours against peers and physical limits, side by side
	.venv/bin/python -m benchmarks $(ARGS)

completion: .venv/installed ## print shell completion of the command `ood`: source <(make -s completion), or ARGS=zsh
	@$(RUN) completion $(ARGS)

clean: ## remove the virtual environment and caches; runs and data stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info

.venv/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

.venv/installed-bench: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[bench]' --constraint constraints.txt
	@touch $@
