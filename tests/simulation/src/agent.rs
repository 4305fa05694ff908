//! A simulated agent: the jobs' table and the connection, as in the agent's `agent.rs`.
//!
//! The lease stream itself (`lease.rs`) and the back-off (`backoff.rs`) are the agent's own files,
//! compiled into this crate. What stands on processes and disks is written again over
//! [`Machine`], in the same order of sync and send.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::lease_response::Frame as Response;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::backoff::Backoff;
use crate::job::{Event, Job, Origin, Told};
use crate::lease::{self, Connection, Incoming};
use crate::machine::{Lease, Machine};
use crate::net;
use crate::ship::Shipper;

const SLOTS: u32 = 2;

/// The software of a build host: an agent that is started again whenever it is killed.
pub(crate) async fn host(machine: Arc<Machine>) -> turmoil::Result {
    machine.boot();
    loop {
        tokio::select! {
            () = Agent::new(&machine).run() => {}
            () = machine.kill.notified() => machine.world.model.fault(format!("agent of {} killed", machine.name)),
        }
        tokio::time::sleep(machine.world.chance.millis(20, 1500)).await;
    }
}

struct Agent {
    machine: Arc<Machine>,
    client: RunnerServiceClient<Channel>,
    jobs: BTreeMap<Lease, mpsc::Sender<Told>>,
    /// The jobs that the last heartbeat named.
    named: Vec<Lease>,
    /// By a person's `Drain`.
    drained: bool,
    /// The highest history that it was told, kept on disk.
    generation: u64,
    events_to: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    /// Ended with the agent.
    tasks: JoinSet<()>,
}

impl Agent {
    fn new(machine: &Arc<Machine>) -> Self {
        let channel = net::channel(&machine.key.to_string(), net::RUNNERS_PORT);
        let (events_to, events) = mpsc::channel(64);
        Self {
            machine: Arc::clone(machine),
            client: RunnerServiceClient::new(channel),
            jobs: BTreeMap::new(),
            named: vec![],
            drained: false,
            generation: 0,
            events_to,
            events,
            tasks: JoinSet::new(),
        }
    }

    async fn run(mut self) {
        for lease in self.machine.leases() {
            self.take_up(lease, Origin::Found);
        }
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
        loop {
            let since = Instant::now();
            let failed = self.connected().await;
            if since.elapsed() >= Duration::from_secs(3) {
                backoff.reset();
            }
            if let Err(error) = failed {
                self.machine
                    .world
                    .model
                    .note(format!("{} lost the plane: {error}", self.machine.name));
            }
            let until = Instant::now() + backoff.next(self.machine.world.chance.fraction());
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => break,
                    Some(event) = self.events.recv() => self.done(&event),
                }
            }
        }
    }

    fn take_up(&mut self, lease: Lease, origin: Origin) {
        let (told, inbox) = mpsc::channel(32);
        let job = Job {
            machine: Arc::clone(&self.machine),
            lease,
            origin,
            shipper: Shipper::new(self.client.clone(), lease, Arc::clone(&self.machine)),
            told: inbox,
            events: self.events_to.clone(),
        };
        self.tasks.spawn(job.run());
        self.jobs.insert(lease, told);
    }

    async fn connected(&mut self) -> Result<(), lease::Error> {
        let hello = v1::Hello {
            slots: SLOTS,
            engines: vec![v1::Engine { name: "terraform".into(), version: "1.11.4".into() }],
            held: self.held(),
            version: "simulated".into(),
            seen: self.machine.seen(),
            ..Default::default()
        };
        let (mut connection, welcome) = Connection::open(self.client.clone(), hello).await?;
        self.machine.world.model.note(format!("{} is welcome", self.machine.name));
        self.generation = welcome.generation;
        self.machine.saw(welcome.history.clone());
        (self.named, self.drained) = (vec![], false);
        let given_up: Vec<Lease> =
            welcome.give_up.iter().filter_map(|lease| Lease::from_wire(Some(lease))).collect();
        for (lease, job) in &self.jobs {
            let told = if given_up.contains(lease) { Told::GiveUp } else { Told::Keep };
            tell(job, told)?;
        }
        loop {
            tokio::select! {
                incoming = connection.next() => match incoming? {
                    Incoming::Frame(frame) => self.frame(*frame, &connection).await?,
                    Incoming::Heartbeat => {
                        self.named = self.jobs.keys().copied().collect();
                        connection.beat(self.held())?;
                    }
                },
                Some(event) = self.events.recv() => match event {
                    Event::Send(frame) => connection.send(*frame)?,
                    event @ Event::Done(_) => self.done(&event),
                },
            }
        }
    }

    fn held(&self) -> Vec<v1::LeaseRef> {
        self.jobs.keys().map(|lease| lease.to_wire()).collect()
    }

    async fn frame(
        &mut self,
        frame: Response,
        connection: &Connection,
    ) -> Result<(), lease::Error> {
        match frame {
            Response::Offer(offer) => {
                let Some(lease) = Lease::from_wire(offer.lease.as_ref()) else { return Ok(()) };
                if !self.jobs.contains_key(&lease) && self.drained {
                    let handed = v1::NeverStarted { lease: offer.lease };
                    return connection.send(Request::NeverStarted(handed));
                }
                if !self.jobs.contains_key(&lease) {
                    self.machine.create(lease, offer.job.unwrap_or_default()).await;
                    self.take_up(lease, Origin::Offered);
                }
                connection.send(Request::Accept(v1::Accept { lease: offer.lease }))
            }
            Response::Go(go) => self.tell(go.lease.clone(), Told::Go(Box::new(go))),
            Response::Cancel(cancel) => self.tell(cancel.lease, Told::Cancel),
            Response::Revoke(revoke) => self.tell(revoke.lease, Told::Revoke),
            Response::Recorded(recorded) => self.tell(recorded.lease, Told::Recorded),
            Response::Renewed(renewed) => {
                let history = renewed.history;
                let renewed: Vec<Lease> = renewed
                    .lease
                    .iter()
                    .filter_map(|lease| Lease::from_wire(Some(lease)))
                    .collect();
                self.machine.saw(history);
                for lease in self.named.iter().filter(|lease| !renewed.contains(lease)) {
                    if let Some(job) = self.jobs.get(lease) {
                        tell(job, Told::NotRenewed)?;
                    }
                }
                Ok(())
            }
            Response::Drain(v1::Drain {}) => {
                self.drained = true;
                Ok(())
            }
            Response::Resume(v1::Resume {}) => {
                self.drained = false;
                Ok(())
            }
            Response::Welcome(_) => Ok(()),
        }
    }

    fn tell(&self, lease: Option<v1::LeaseRef>, told: Told) -> Result<(), lease::Error> {
        let job = Lease::from_wire(lease.as_ref()).and_then(|lease| self.jobs.get(&lease));
        job.map_or(Ok(()), |job| tell(job, told))
    }

    fn done(&mut self, event: &Event) {
        if let Event::Done(lease) = event {
            self.jobs.remove(lease);
        }
    }
}

fn tell(job: &mpsc::Sender<Told>, told: Told) -> Result<(), lease::Error> {
    match job.try_send(told) {
        Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        Err(mpsc::error::TrySendError::Full(_)) => Err(lease::Error::Stuck),
    }
}
