//! A terraform that takes simulated time: it prints lines, an apply writes states, a cancel lets
//! it finish what it is at. It lives until it ends or its host goes down.

use std::sync::Arc;

use latchkey_domain::policy::Phase;
use tokio::sync::watch;

use crate::machine::{Lease, Machine};

/// How far it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) lines: u64,
    pub(crate) states: u64,
    pub(crate) exit: Option<Exit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Success,
    Failure,
    Canceled,
}

pub(crate) struct Terraform {
    pub(crate) progress: watch::Receiver<Progress>,
    cancel: watch::Sender<bool>,
    withdrawn: watch::Sender<bool>,
}

impl Terraform {
    /// Executes it on a host.
    pub(crate) fn start(machine: &Arc<Machine>, lease: Lease) -> Arc<Self> {
        let (progress_to, progress) = watch::channel(Progress::default());
        let (cancel, canceled) = watch::channel(false);
        let (withdrawn, is_withdrawn) = watch::channel(false);
        let started = Arc::new(Self { progress, cancel, withdrawn });
        let machine = Arc::clone(machine);
        tokio::spawn(async move {
            run(&machine, lease, &progress_to, &canceled, &is_withdrawn).await;
            // What it left is read after its end.
            progress_to.closed().await;
        });
        started
    }

    pub(crate) fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    pub(crate) fn withdraw(&self) {
        self.withdrawn.send_replace(true);
    }
}

async fn run(
    machine: &Machine,
    lease: Lease,
    progress: &watch::Sender<Progress>,
    canceled: &watch::Receiver<bool>,
    withdrawn: &watch::Receiver<bool>,
) {
    let chance = &machine.world.chance;
    let steps = chance.between(1, 8);
    let slow = chance.happens(0.2);
    for _ in 0..steps {
        tokio::time::sleep(chance.millis(5, if slow { 1500 } else { 200 })).await;
        let lines = chance.between(1, 5);
        progress.send_modify(|progress| progress.lines += lines);
        if lease.phase == Phase::Apply && chance.happens(0.5) {
            progress.send_modify(|progress| progress.states += 1);
        }
        if *canceled.borrow() {
            progress.send_modify(|progress| progress.exit = Some(Exit::Canceled));
            return;
        }
        if *withdrawn.borrow() {
            progress.send_modify(|progress| progress.exit = Some(Exit::Failure));
            return;
        }
    }
    let exit = if chance.happens(0.07) { Exit::Failure } else { Exit::Success };
    progress.send_modify(|progress| {
        progress.states += u64::from(lease.phase == Phase::Apply);
        progress.exit = Some(exit);
    });
}
