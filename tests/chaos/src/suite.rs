//! Plays rounds over several beds, and tells one line per scenario.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use tokio::time::Instant;

use crate::Arguments;
use crate::bed::Bed;
use crate::check::{self, Violation};
use crate::frames::Played;
use crate::random::Random;
use crate::scenarios::{Kind, SCENARIOS, Scenario};
use crate::{frames, old_copy, story};

/// Rounds that share a bed: its start costs as much as a round.
const SHARE: u64 = 10;

/// Rounds of one scenario, on one bed.
#[derive(Debug, Clone)]
struct Share {
    scenario: Scenario,
    seeds: std::ops::Range<u64>,
}

/// What became of a scenario.
#[derive(Debug, Default)]
struct Outcome {
    rounds: u64,
    struck: u64,
    failures: Vec<Failure>,
}

#[derive(Debug)]
struct Failure {
    seed: u64,
    violations: Vec<Violation>,
    kept: String,
}

pub(crate) fn main(arguments: Arguments) -> ExitCode {
    if arguments.list {
        for scenario in SCENARIOS {
            say(&format!("{:<26} {}", scenario.name, scenario.about));
        }
        return ExitCode::SUCCESS;
    }
    let built = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = built.context("start the runtime").and_then(|runtime| {
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, run(arguments))
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("cargo chaos: failed to {error:#}"));
            ExitCode::from(2)
        }
    }
}

/// Answers whether all promises held.
async fn run(arguments: Arguments) -> anyhow::Result<bool> {
    let arguments = Arc::new(arguments);
    let mut shares = VecDeque::new();
    for name in &arguments.scenario {
        let known = SCENARIOS.iter().any(|scenario| scenario.name == name);
        anyhow::ensure!(known, "find the scenario {name}: --list names them");
    }
    for scenario in SCENARIOS {
        let wanted = arguments.scenario.is_empty()
            || arguments.scenario.iter().any(|name| name == scenario.name);
        let rounds = if arguments.short { scenario.short } else { arguments.rounds };
        if !wanted {
            continue;
        }
        let (first, end) = (arguments.seed, arguments.seed + rounds);
        let mut seed = first;
        while seed < end {
            let next = (seed + SHARE).min(end);
            shares.push_back(Share { scenario: *scenario, seeds: seed..next });
            seed = next;
        }
    }
    let order: Vec<&'static str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
    let mut open: BTreeMap<&'static str, usize> = BTreeMap::new();
    for share in &shares {
        *open.entry(share.scenario.name).or_default() += 1;
    }
    let shares = Arc::new(Mutex::new(shares));
    let (told, mut outcomes) = tokio::sync::mpsc::channel(16);
    for _ in 0..arguments.jobs.max(1) {
        let (shares, told, arguments) = (Arc::clone(&shares), told.clone(), Arc::clone(&arguments));
        tokio::task::spawn_local(async move {
            loop {
                let share = shares.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some(share) = share else { return };
                let name = share.scenario.name;
                let outcome = play(share, &arguments).await;
                if told.send((name, outcome)).await.is_err() {
                    return;
                }
            }
        });
    }
    drop(told);
    let mut results: BTreeMap<&'static str, Outcome> = BTreeMap::new();
    let mut good = true;
    while let Some((name, outcome)) = outcomes.recv().await {
        let outcome = outcome?;
        let result = results.entry(name).or_default();
        result.rounds += outcome.rounds;
        result.struck += outcome.struck;
        result.failures.extend(outcome.failures);
        if let Some(left) = open.get_mut(name) {
            *left -= 1;
            if *left == 0 {
                good &= result.failures.is_empty();
                tell(name, result);
            }
        }
    }
    let (rounds, struck, failed) =
        order.iter().filter_map(|name| results.get(name)).fold((0, 0, 0), |sum, result| {
            (sum.0 + result.rounds, sum.1 + result.struck, sum.2 + result.failures.len())
        });
    say(&format!("{:<26} {rounds:>6} rounds {struck:>7} faults {failed:>4} violations", "all"));
    Ok(good)
}

fn tell(name: &str, result: &Outcome) {
    let Outcome { rounds, struck, failures } = result;
    say(&format!(
        "{name:<26} {rounds:>6} rounds {struck:>7} faults {:>4} violations",
        failures.len()
    ));
    for Failure { seed, violations, kept } in failures {
        for Violation { invariant, detail } in violations {
            say(&format!("    violated: {invariant}: {detail}"));
        }
        say(&format!(
            "    again: cargo chaos --scenario {name} --rounds 1 --seed {seed}; kept: {kept}"
        ));
    }
}

async fn play(share: Share, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut bed: Option<Bed> = None;
    for seed in share.seeds {
        let mut on = match bed.take() {
            Some(bed) => bed,
            None => Bed::make(share.scenario.engine, share.scenario.hosts)
                .await
                .context("make a bed")?,
        };
        if let Some(defect) = &arguments.plant {
            on.lay(&format!("defect.{defect}"), "")?;
        }
        let begin = Instant::now();
        let played = round(&mut on, &share.scenario, seed, arguments.verbose).await;
        outcome.rounds += 1;
        let violations = match played {
            Ok(played) => {
                outcome.struck += played.struck;
                played.violations
            }
            Err(error) => {
                let detail = format!("{error:#}");
                vec![Violation { invariant: "everything answers once it is healed", detail }]
            }
        };
        if arguments.verbose {
            let took = begin.elapsed();
            say(&format!(
                "{} {seed}: {} violations, {took:?}",
                share.scenario.name,
                violations.len()
            ));
        }
        if violations.is_empty() {
            bed = Some(on);
        } else {
            // A planted defect is no news.
            let kept = match &arguments.plant {
                Some(_) => "nothing".to_owned(),
                None => on.keep().display().to_string(),
            };
            outcome.failures.push(Failure { seed, violations, kept });
        }
    }
    Ok(outcome)
}

async fn round(
    bed: &mut Bed,
    scenario: &Scenario,
    seed: u64,
    verbose: bool,
) -> anyhow::Result<Played> {
    let mut random = Random::new(seed, scenario.name);
    let plan = match scenario.kind {
        Kind::Story(plan) => plan,
        Kind::Frames => return frames::play(bed, &mut random).await,
        Kind::OldCopy(how) => return old_copy::play(bed, how, &mut random).await,
    };
    let mut plan = plan(&mut random, seed);
    plan.engine = scenario.engine;
    if verbose {
        say(&format!("{} {seed}: {plan:?}", scenario.name));
    }
    let played = story::play(bed, plan).await;
    bed.lift_all();
    bed.twin = None;
    let seen = played?;
    if verbose {
        let state = seen.run.as_ref().map(|run| (run.state(), run.reason.clone()));
        say(&format!("{} {seed}: {} faults, {state:?}", scenario.name, seen.struck));
    }
    Ok(Played { struck: seen.struck, violations: check::look(bed, &seen).await? })
}

fn say(line: &str) {
    // Nobody may be there to read it.
    let _ = writeln!(anstream::stdout(), "{line}");
}
