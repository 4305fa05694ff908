//! The supervisor of one job: waits for `Go`, records, executes, copies what terraform prints and
//! writes into the job directory, and records the result. One that replaces another finds the
//! running terraform, or that it is gone, and cannot know how it ended.

use std::sync::Arc;

use latchkey_control_plane::auth::sha256;
use latchkey_domain::policy::Phase;
use latchkey_proto::v1;
use latchkey_proto::v1::finished::Result as Ended;
use tokio::sync::{mpsc, watch};

use crate::machine::{Directory, Lease, Machine, Order, Run, Stage, Status, on_disk};
use crate::plan::Plant;
use crate::terraform::{Exit, Terraform};

const VERSION: &str = "1.11.4";

pub(crate) async fn run(
    machine: &Arc<Machine>,
    lease: Lease,
    mut orders: mpsc::Receiver<Order>,
    status: &watch::Sender<Status>,
) {
    let (terraform, knows_its_child) = match machine.directory(lease).stage() {
        Stage::Ended => return,
        Stage::Executed => {
            let Some(terraform) = machine.terraform(lease) else {
                end(machine, lease, status, failed(v1::JobFailure::EndedUnknown)).await;
                return;
            };
            status.send_modify(|status| status.wants_secrets = true);
            (terraform, false)
        }
        Stage::Accepted | Stage::Starting => loop {
            match orders.recv().await {
                Some(Order::Go) => break (execute(machine, lease).await, true),
                Some(Order::Refuse(refused)) => {
                    end(machine, lease, status, Ended::Failed(refused)).await;
                    return;
                }
                Some(Order::Cancel) => {
                    end(machine, lease, status, failed(v1::JobFailure::Canceled)).await;
                    return;
                }
                Some(Order::GiveUp) | None => return,
                Some(Order::Withdraw) => {}
            }
        },
    };
    status.send_modify(|status| status.stage = Run::Executing);
    let exit = follow(machine, lease, &terraform, &mut orders, status).await;
    let result = match (exit, knows_its_child, lease.phase) {
        (_, false, _) => failed(v1::JobFailure::EndedUnknown),
        (Exit::Success, true, Phase::Plan) => {
            let made = Made::by(lease);
            let digests = made.digests();
            machine
                .record("workspace.tar.gz", lease, |directory| {
                    directory.workspace = made.workspace;
                    directory.changes = made.changes;
                })
                .await;
            Ended::Plan(v1::PlanFinished {
                digests: Some(digests),
                applyable: true,
                add: 1,
                terraform_version: VERSION.into(),
                ..Default::default()
            })
        }
        (Exit::Success, true, Phase::Apply) => {
            Ended::Apply(v1::ApplyFinished { outputs_json: "{}".into() })
        }
        (Exit::Failure, true, _) => failed(v1::JobFailure::Errored),
        (Exit::Canceled, true, _) => failed(v1::JobFailure::Canceled),
    };
    end(machine, lease, status, result).await;
}

/// The point of no return: recorded, and only then done.
async fn execute(machine: &Arc<Machine>, lease: Lease) -> Arc<Terraform> {
    let unsynced = machine.world.plant == Some(Plant::ExecUnsynced);
    if !unsynced {
        machine.record("exec", lease, |directory| directory.exec = true).await;
    }
    let spec = machine.directory(lease).spec;
    machine.world.model.executes(lease, &machine.name, &spec);
    let terraform = Terraform::start(machine, lease);
    machine.keep_terraform(lease, &terraform);
    if unsynced {
        tokio::time::sleep(std::time::Duration::from_millis(150)).await;
        machine.record("exec", lease, |directory| directory.exec = true).await;
    }
    terraform
}

/// Copies what terraform makes into the directory until it ends.
async fn follow(
    machine: &Arc<Machine>,
    lease: Lease,
    terraform: &Arc<Terraform>,
    orders: &mut mpsc::Receiver<Order>,
    status: &watch::Sender<Status>,
) -> Exit {
    let mut progress = terraform.progress.clone();
    let mut open = true;
    loop {
        let now = *progress.borrow_and_update();
        copy(machine, lease, now.lines, now.states).await;
        publish(machine, lease, status);
        if let Some(exit) = now.exit {
            return exit;
        }
        tokio::select! {
            changed = progress.changed() => if changed.is_err() { return Exit::Failure },
            order = orders.recv(), if open => match order {
                Some(Order::Go | Order::GiveUp) => {
                    status.send_modify(|status| status.wants_secrets = false);
                }
                Some(Order::Cancel) => terraform.cancel(),
                Some(Order::Withdraw) => terraform.withdraw(),
                Some(Order::Refuse(_)) => {}
                None => open = false,
            },
        }
    }
}

async fn copy(machine: &Machine, lease: Lease, lines: u64, states: u64) {
    let model = &machine.world.model;
    let known = machine.directory(lease);
    if known.log_lines < lines {
        let run = model.name(lease.run);
        let new: String = (known.log_lines..lines)
            .map(|n| {
                format!(
                    "{{\"@message\":\"{run} line {n}\",\"phase\":\"{}\",\"epoch\":{},\"n\":{n}}}\n",
                    lease.phase, lease.epoch
                )
            })
            .collect();
        machine
            .record("log", lease, |directory| {
                directory.log.extend_from_slice(new.as_bytes());
                directory.log_lines = lines;
                model.wrote_log(lease, new.as_bytes());
            })
            .await;
    }
    for sequence in known.states.len() as u64 + 1..=states {
        let state = state(&known, lease, sequence);
        model.wrote_state(sha256(&state), lease);
        machine.record("state", lease, |directory| directory.states.push(state)).await;
    }
}

fn state(directory: &Directory, lease: Lease, sequence: u64) -> Vec<u8> {
    serde_json::json!({
        "version": 4,
        "lineage": format!("of-{}", directory.spec.environment),
        "serial": directory.base_serial + sequence,
        "run": lease.run.to_string(),
        "epoch": lease.epoch,
    })
    .to_string()
    .into_bytes()
}

async fn end(machine: &Machine, lease: Lease, status: &watch::Sender<Status>, result: Ended) {
    machine.record("result.json", lease, |directory| directory.result = Some(result)).await;
    publish(machine, lease, status);
}

fn publish(machine: &Machine, lease: Lease, status: &watch::Sender<Status>) {
    let on_disk = on_disk(&machine.directory(lease));
    status.send_modify(|status| {
        *status = Status { wants_secrets: status.wants_secrets, ..on_disk };
    });
}

pub(crate) fn failed(kind: v1::JobFailure) -> Ended {
    let reason = kind.as_str_name().to_owned();
    Ended::Failed(v1::JobFailed { reason, kind: kind.into(), exit_code: None })
}

/// What a plan leaves for its apply.
pub(crate) struct Made {
    pub(crate) workspace: Vec<u8>,
    pub(crate) changes: Vec<u8>,
}

impl Made {
    pub(crate) fn by(lease: Lease) -> Self {
        let of = format!("{} {}", lease.run, lease.epoch);
        let changes = serde_json::json!({ "changes": of }).to_string().into_bytes();
        Self { workspace: format!("workspace {of}").into_bytes(), changes }
    }

    fn digests(&self) -> v1::ApprovedPlan {
        v1::ApprovedPlan {
            plan_digest: sha256(&self.workspace).to_string(),
            workspace_digest: sha256(&self.workspace).to_string(),
            lock_file_digest: String::new(),
            changes_digest: sha256(&self.changes).to_string(),
        }
    }
}
