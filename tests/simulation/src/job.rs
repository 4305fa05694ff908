//! One job from the agent's side, over any number of connections and restarts: the states and the
//! order of the agent's `agent/job.rs`.

use std::sync::Arc;
use std::time::Duration;

use latchkey_control_plane::auth::sha256;
use latchkey_domain::policy::Phase;
use latchkey_proto::v1;
use latchkey_proto::v1::finished::Result as Ended;
use latchkey_proto::v1::lease_request::Frame;
use tokio::sync::{mpsc, watch};

use crate::machine::{Lease, Link, Machine, Order, Run, Stage, Status, on_disk};
use crate::ship::{Fetched, Shipped, Shipper};
use crate::supervisor::failed;

/// What the lease stream tells a job.
#[derive(Debug)]
pub(crate) enum Told {
    Keep,
    GiveUp,
    Go(Box<v1::Go>),
    Cancel,
    Revoke,
    Recorded,
    NotRenewed,
}

/// What a job tells the agent.
pub(crate) enum Event {
    Send(Box<Frame>),
    Done(Lease),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Offered,
    Found,
}

enum Prepared {
    Ready,
    Refused(v1::JobFailure),
    LeaseLost,
}

enum Followed {
    /// `None` when the lease was lost.
    Shipped(Option<Shipped>),
    NeverStarted,
    GivenUp,
}

pub(crate) struct Job {
    pub(crate) machine: Arc<Machine>,
    pub(crate) lease: Lease,
    pub(crate) origin: Origin,
    pub(crate) shipper: Shipper,
    pub(crate) told: mpsc::Receiver<Told>,
    pub(crate) events: mpsc::Sender<Event>,
}

impl Job {
    pub(crate) async fn run(mut self) {
        self.live().await;
        self.machine.wipe(self.lease).await;
        let _ = self.events.send(Event::Done(self.lease)).await;
    }

    async fn live(&mut self) {
        let link = match (self.machine.directory(self.lease).stage(), self.origin) {
            (Stage::Accepted, Origin::Offered) => match self.prepare().await {
                Some(link) => Some(link),
                None => return,
            },
            (Stage::Accepted, Origin::Found) => {
                if let Some(link) = self.machine.link(self.lease) {
                    dismiss(link).await;
                }
                return;
            }
            (Stage::Starting | Stage::Executed | Stage::Ended, _) => None,
        };
        if let Some(shipped) = self.machine.directory(self.lease).shipped {
            return self.finish(shipped).await;
        }
        match self.follow(link).await {
            Followed::Shipped(Some(shipped)) => {
                let hint = Some(shipped.clone());
                self.machine.set_shipped(self.lease, |directory| directory.shipped = hint);
                self.finish(shipped).await;
            }
            Followed::Shipped(None) => self.quarantine().await,
            Followed::NeverStarted => self.never_started().await,
            Followed::GivenUp => {}
        }
    }

    /// Steps 3 and 4. Answers `None` when the lease was lost meanwhile.
    async fn prepare(&mut self) -> Option<Link> {
        let link = self.machine.supervise(self.lease);
        let prepared = {
            let (shipper, machine, lease) =
                (self.shipper.clone(), Arc::clone(&self.machine), self.lease);
            let preparing = fetch(&shipper, &machine, lease);
            tokio::pin!(preparing);
            loop {
                tokio::select! {
                    prepared = &mut preparing => break prepared,
                    told = self.told.recv() => match told {
                        Some(Told::GiveUp | Told::Revoke) => break Prepared::LeaseLost,
                        Some(Told::Cancel) => {
                            break Prepared::Refused(v1::JobFailure::Canceled);
                        }
                        Some(Told::Keep | Told::Recorded | Told::Go(_) | Told::NotRenewed) => {}
                        None => std::future::pending().await,
                    },
                }
            }
        };
        match prepared {
            Prepared::Ready => {
                self.machine.record("starting", self.lease, |d| d.starting = true).await;
                self.say(Frame::Starting(v1::Starting { lease: self.wire() })).await;
                Some(link)
            }
            Prepared::Refused(kind) => {
                let Ended::Failed(refused) = failed(kind) else { return Some(link) };
                let _ = link.orders.send(Order::Refuse(refused)).await;
                Some(link)
            }
            Prepared::LeaseLost => {
                dismiss(link).await;
                None
            }
        }
    }

    /// Follows the supervisor while everything is shipped; replaces it when it dies.
    async fn follow(&mut self, mut link: Option<Link>) -> Followed {
        let on_disk = on_disk(&self.machine.directory(self.lease));
        let (status_to, status) = watch::channel(on_disk);
        let shipper = self.shipper.clone();
        let shipping = shipper.ship_all(status);
        tokio::pin!(shipping);
        let mut asked = link.is_some() && self.asks(*status_to.borrow()).is_some();
        let mut says_at_once = self.origin != Origin::Found;
        let mut given_up = false;
        // What a supervisor is told again when it was replaced.
        let mut stopping = false;
        loop {
            if link.is_none() && status_to.borrow().stage != Run::Ended {
                match self.reach() {
                    Reached::Attached(attached) => {
                        let now = *attached.status.borrow();
                        publish(&status_to, now);
                        if stopping {
                            let _ = attached.orders.send(Order::Cancel).await;
                        }
                        link = Some(attached);
                        let ask = self.asks(now);
                        asked = ask.is_some();
                        if let (Some(ask), true) = (ask, says_at_once) {
                            self.say(ask).await;
                        }
                    }
                    Reached::Ended => {
                        publish(
                            &status_to,
                            crate::machine::on_disk(&self.machine.directory(self.lease)),
                        );
                    }
                    Reached::Nobody if given_up => return Followed::GivenUp,
                    Reached::Nobody => return Followed::NeverStarted,
                }
                says_at_once = true;
            }
            tokio::select! {
                shipped = &mut shipping => return Followed::Shipped(shipped),
                changed = next_status(&mut link) => {
                    let Some(status) = changed else {
                        link = None;
                        continue;
                    };
                    publish(&status_to, status);
                    let executing = status.stage == Run::Executing;
                    if given_up && executing && self.lease.phase == Phase::Plan && !stopping {
                        stopping = true;
                        if let Some(link) = &link {
                            let _ = link.orders.send(Order::Cancel).await;
                        }
                    }
                    let ask = self.asks(status);
                    let newly = ask.is_some() && !asked;
                    asked = ask.is_some();
                    if let (Some(ask), true) = (ask, newly) {
                        self.say(ask).await;
                    }
                }
                told = self.told.recv() => {
                    let Some(told) = told else { std::future::pending().await };
                    let status = *status_to.borrow();
                    let executing = status.stage >= Run::Executing;
                    let orders = match told {
                        Told::Keep => {
                            self.shipper.lease_stands();
                            if let Some(ask) = self.asks(status) {
                                self.say(ask).await;
                            }
                            vec![]
                        }
                        Told::Go(go) => {
                            let key = go.credentials.as_ref().map(|c| c.access_key_id.clone());
                            let model = &self.machine.world.model;
                            model.went(self.lease, self.machine.runner, key.as_deref());
                            vec![Order::Go]
                        }
                        Told::Cancel => {
                            stopping = true;
                            vec![Order::Cancel]
                        }
                        // An apply goes on; a plan changes nothing that would be missed.
                        Told::GiveUp | Told::Revoke if executing => {
                            self.shipper.lease_is_lost();
                            let mut orders = vec![];
                            if matches!(told, Told::Revoke) {
                                orders.push(Order::Withdraw);
                            }
                            if status.wants_secrets {
                                orders.push(Order::GiveUp);
                            }
                            if self.lease.phase == Phase::Plan && !stopping {
                                stopping = true;
                                orders.push(Order::Cancel);
                            }
                            orders
                        }
                        Told::GiveUp => {
                            given_up = true;
                            self.shipper.lease_is_lost();
                            vec![Order::GiveUp]
                        }
                        Told::Revoke => {
                            given_up = true;
                            self.shipper.lease_is_lost();
                            vec![Order::GiveUp, Order::Withdraw]
                        }
                        Told::NotRenewed => {
                            self.shipper.lease_is_in_doubt();
                            vec![]
                        }
                        Told::Recorded => vec![],
                    };
                    if let Some(link) = &link {
                        for order in orders {
                            let _ = link.orders.send(order).await;
                        }
                    }
                }
            }
        }
    }

    /// Answers what the job waits for the control plane to say.
    fn asks(&self, status: Status) -> Option<Frame> {
        let starting = self.machine.directory(self.lease).stage() == Stage::Starting;
        if status.stage == Run::Waiting && starting {
            Some(Frame::Starting(v1::Starting { lease: self.wire() }))
        } else if status.wants_secrets {
            Some(Frame::Again(v1::Again { lease: self.wire() }))
        } else {
            None
        }
    }

    fn reach(&self) -> Reached {
        if let Some(link) = self.machine.link(self.lease) {
            return Reached::Attached(link);
        }
        match self.machine.directory(self.lease).stage() {
            Stage::Ended => Reached::Ended,
            Stage::Executed => Reached::Attached(self.machine.supervise(self.lease)),
            Stage::Accepted | Stage::Starting => Reached::Nobody,
        }
    }

    async fn never_started(&mut self) {
        self.leave_with(Frame::NeverStarted(v1::NeverStarted { lease: self.wire() })).await;
    }

    /// Says that the job leaves without a result, until that was heard.
    async fn leave_with(&mut self, frame: Frame) {
        self.say(frame.clone()).await;
        loop {
            match self.told.recv().await {
                Some(Told::Keep) => self.say(frame.clone()).await,
                Some(Told::GiveUp | Told::Revoke | Told::Recorded | Told::NotRenewed) => return,
                Some(Told::Go(_) | Told::Cancel) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Step 6.
    async fn finish(&mut self, shipped: Shipped) {
        let directory = self.machine.directory(self.lease);
        let Some(result) = shipped.instead.or(directory.result) else { return };
        if let Ended::Failed(refused) = &result {
            if refused.kind() == v1::JobFailure::Canceled && !directory.exec {
                return self.never_started().await;
            }
            if !directory.starting {
                let reason = refused.reason.clone();
                let decline = v1::Decline { lease: self.wire(), reason };
                return self.leave_with(Frame::Decline(decline)).await;
            }
        }
        let finished = Frame::Finished(v1::Finished {
            lease: self.wire(),
            log_length: shipped.log_length,
            result: Some(result),
        });
        self.say(finished.clone()).await;
        loop {
            match self.told.recv().await {
                Some(Told::Recorded) => {
                    self.machine.world.model.recorded(self.lease);
                    return;
                }
                Some(Told::Revoke) => return self.quarantine().await,
                // A given up lease may be one whose end was recorded: the answer was lost.
                Some(Told::Keep | Told::GiveUp) => self.say(finished.clone()).await,
                Some(Told::Go(_) | Told::Cancel | Told::NotRenewed) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Brings what a lost lease left, beside the run.
    async fn quarantine(&mut self) {
        let directory = self.machine.directory(self.lease);
        if !directory.exec {
            return;
        }
        let finished = v1::Finished {
            lease: self.wire(),
            log_length: directory.log.len() as u64,
            result: directory.result,
        };
        // What is refused is set aside for a person; in this world there is none to look.
        let whole = self.shipper.quarantine(&finished).await;
        self.machine.world.model.quarantined(self.lease, whole);
    }

    fn wire(&self) -> Option<v1::LeaseRef> {
        Some(self.lease.to_wire())
    }

    async fn say(&self, frame: Frame) {
        let _ = self.events.send(Event::Send(Box::new(frame))).await;
    }
}

/// Who answers for the job on this host.
enum Reached {
    Attached(Link),
    Ended,
    /// No supervisor lives, none can start, and terraform did not run.
    Nobody,
}

/// Fetches what the job needs and compares it with what was approved.
async fn fetch(shipper: &Shipper, machine: &Machine, lease: Lease) -> Prepared {
    let spec = machine.directory(lease).spec;
    let kind = match lease.phase {
        Phase::Plan => v1::ArtifactKind::Configuration,
        Phase::Apply => v1::ArtifactKind::Workspace,
    };
    match shipper.fetch(kind).await {
        Fetched::Data(data) if sha256(&data).to_string() == spec.archive_digest => {}
        Fetched::Data(_) => return Prepared::Refused(v1::JobFailure::PlanChanged),
        Fetched::LeaseLost => return Prepared::LeaseLost,
        Fetched::Refused => return Prepared::Refused(v1::JobFailure::Errored),
    }
    if spec.has_state {
        let serial = match shipper.fetch(v1::ArtifactKind::State).await {
            Fetched::Data(state) => serde_json::from_slice::<serde_json::Value>(&state)
                .ok()
                .and_then(|state| state["serial"].as_u64())
                .unwrap_or_default(),
            Fetched::LeaseLost => return Prepared::LeaseLost,
            Fetched::Refused => return Prepared::Refused(v1::JobFailure::Errored),
        };
        machine.record("state/base", lease, |directory| directory.base_serial = serial).await;
    }
    Prepared::Ready
}

/// Tells the shipper. What is durable stays so, whatever a new supervisor knows of it yet.
fn publish(to: &watch::Sender<Status>, status: Status) {
    to.send_modify(|known| {
        *known = Status {
            states: status.states.max(known.states),
            log: status.log.max(known.log),
            ..status
        };
    });
}

async fn next_status(link: &mut Option<Link>) -> Option<Status> {
    match link {
        Some(link) => match link.status.changed().await {
            Ok(()) => Some(*link.status.borrow_and_update()),
            Err(_) => None,
        },
        None => std::future::pending().await,
    }
}

/// Sends a supervisor away that has nothing to do yet, and waits until it is gone.
async fn dismiss(mut link: Link) {
    let _ = link.orders.send(Order::GiveUp).await;
    let gone = async { while link.status.changed().await.is_ok() {} };
    let _ = tokio::time::timeout(Duration::from_secs(1), gone).await;
}
