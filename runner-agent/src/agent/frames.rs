//! What the agent does with each frame of the lease stream. Most go to the job they are about.

use std::collections::HashMap;

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::lease_response::Frame as Response;
use tokio::time::Duration;

use super::intake;
use super::job::Origin;
use super::told::{Event, Told};
use super::{Agent, Held};
use crate::config::Lifetime;
use crate::host;
use crate::job::{Lease, Phase, Spec};
use crate::job_directory::{JobDirectory, Settings};
use crate::lease::{self, Connection};
use crate::spool::Room;

/// What becomes of an offer that this runner could prepare.
enum Answer {
    Accept,
    /// For another runner.
    HandBack,
    /// For another runner, after a pause: this one cannot take it, and would be asked again at
    /// once.
    HandBackAfter(Duration),
}

impl Agent {
    /// Step 1.
    pub(super) fn hello(&mut self) -> v1::Hello {
        v1::Hello {
            slots: match self.config.lifetime {
                Lifetime::UntilStopped => self.config.slots,
                Lifetime::OneJob => 1,
            },
            engines: self.engines.to_wire(),
            labels: HashMap::from_iter(self.config.labels.clone()),
            held: self.held(),
            version: env!("CARGO_PKG_VERSION").into(),
            accepts: match self.config.accepts {
                None => vec![],
                Some(Phase::Plan) => vec![v1::Phase::Plan.into()],
                Some(Phase::Apply) => vec![v1::Phase::Apply.into()],
            },
            host: Some(host::facts(&self.isolation)),
            seen: self.seen.kept(),
            draining: self.intake.is_leaving() || self.intake.is_unfit(),
        }
    }

    pub(super) fn held(&self) -> Vec<v1::LeaseRef> {
        self.jobs.keys().map(Lease::to_wire).collect()
    }

    /// Step 2.
    pub(super) fn welcomed(&mut self, welcome: &v1::Welcome) -> Result<(), lease::Error> {
        self.seen.note(welcome.history.clone());
        self.intake.resume();
        self.named.clear();
        let given_up: Vec<Lease> =
            welcome.give_up.iter().filter_map(|lease| Lease::from_wire(lease).ok()).collect();
        for (lease, held) in &self.jobs {
            let told = if given_up.contains(lease) { Told::GiveUp } else { Told::Keep };
            held.tell(told)?;
        }
        Ok(())
    }

    /// Step 5.
    pub(super) fn beat(&mut self, connection: &mut Connection) -> Result<u64, lease::Error> {
        self.named = self.jobs.keys().cloned().collect();
        connection.beat(self.held())
    }

    pub(super) fn frame(
        &mut self,
        frame: Response,
        connection: &mut Connection,
    ) -> Result<(), lease::Error> {
        match frame {
            Response::Offer(offer) => self.offered(offer, connection),
            Response::Go(mut go) => {
                // Whoever starts terraform can prove later that it was released.
                self.seen.note(go.history.take());
                self.seen.keep();
                self.tell(go.lease.clone(), Told::Go(go))
            }
            Response::Cancel(cancel) => {
                self.tell(cancel.lease, Told::Cancel { force: cancel.force })
            }
            Response::Revoke(revoke) => {
                tracing::info!(reason = %revoke.reason, "a lease is revoked");
                self.tell(revoke.lease, Told::Revoke)
            }
            Response::Recorded(recorded) => self.tell(recorded.lease, Told::Recorded),
            Response::Drain(v1::Drain {}) => {
                tracing::info!("drained by a person: no job is taken");
                self.intake.drain();
                Ok(())
            }
            Response::Resume(v1::Resume {}) => {
                tracing::info!("a person has taken the drain back");
                self.intake.resume();
                Ok(())
            }
            Response::Renewed(renewed) => {
                self.seen.note(renewed.history);
                let renewed: Vec<Lease> =
                    renewed.lease.iter().filter_map(|lease| Lease::from_wire(lease).ok()).collect();
                // One accepted since the heartbeat cannot be in its answer.
                for lease in self.named.iter().filter(|lease| !renewed.contains(lease)) {
                    if let Some(held) = self.jobs.get(lease) {
                        held.tell(Told::NotRenewed)?;
                    }
                }
                Ok(())
            }
            // It is the first frame, and was.
            Response::Welcome(_) => Ok(()),
        }
    }

    fn offered(
        &mut self,
        offer: v1::Offer,
        connection: &mut Connection,
    ) -> Result<(), lease::Error> {
        let lease = offer.lease.clone();
        match self.accept(offer) {
            Ok(Answer::Accept) => {
                connection.send(Request::Accept(v1::Accept { lease }))?;
                if self.config.lifetime == Lifetime::OneJob {
                    self.drain(Some(connection))?;
                }
                Ok(())
            }
            Ok(Answer::HandBack) => {
                connection.send(Request::NeverStarted(v1::NeverStarted { lease }))
            }
            Ok(Answer::HandBackAfter(wait)) => {
                let events = self.events_to.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(wait).await;
                    let frame = Request::NeverStarted(v1::NeverStarted { lease });
                    let _ = events.send(Event::Send(Box::new(frame))).await;
                });
                Ok(())
            }
            Err(reason) => {
                tracing::warn!(%reason, "declined an offer");
                connection.send(Request::Decline(v1::Decline { lease, reason }))
            }
        }
    }

    /// Step 3. Answers why the job cannot be prepared on a runner like this one: that ends it.
    ///
    /// Slots are counted by the control plane alone: jobs that it has given up take none, while
    /// here they may still have something to bring.
    fn accept(&mut self, offer: v1::Offer) -> Result<Answer, String> {
        let lease =
            Lease::from_wire(&offer.lease.unwrap_or_default()).map_err(|e| e.to_string())?;
        if self.jobs.contains_key(&lease) {
            return Ok(Answer::Accept);
        }
        match self.intake.judge(lease.phase) {
            intake::Answer::Takes => {}
            intake::Answer::Closed => {
                tracing::info!(?lease, "handed an offer back: this runner takes no more jobs");
                return Ok(Answer::HandBack);
            }
            intake::Answer::OtherPhase => {
                tracing::warn!(?lease, "hands an offer back: this runner does not take the phase");
                return Ok(Answer::HandBackAfter(self.rest.after_a_failure()));
            }
        }
        let room = *self.room.borrow();
        if room != Room::Enough {
            tracing::warn!(?lease, ?room, "hands an offer back: the spool is full");
            return Ok(Answer::HandBackAfter(self.rest.after_a_failure()));
        }
        let job = offer.job.unwrap_or_default();
        let spec = Spec::from_wire(lease.phase, job).map_err(|error| error.to_string())?;
        let engine = self.engines.choose(spec.engine, &spec.terraform_version)?;
        let settings = Settings {
            engine: engine.name,
            terraform: engine.path,
            terraform_version: engine.version,
            ..self.settings.clone()
        };
        let created = JobDirectory::create(&self.jobs_path, &lease, &spec, &settings);
        let directory = match created {
            Ok(directory) => directory,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "failed to make a job directory");
                return Ok(Answer::HandBackAfter(self.rest.after_a_failure()));
            }
        };
        tracing::info!(?lease, "accepted");
        latchkey_failpoint::reach("run.accepted");
        self.take_up(directory, lease, spec, Origin::Offered);
        Ok(Answer::Accept)
    }

    fn tell(&self, lease: Option<v1::LeaseRef>, told: Told) -> Result<(), lease::Error> {
        let held = Lease::from_wire(&lease.unwrap_or_default())
            .ok()
            .and_then(|lease| self.jobs.get(&lease));
        match held {
            Some(held) => held.tell(told),
            // Of an older epoch, or already gone.
            None => Ok(()),
        }
    }
}

impl Held {
    pub(super) fn tell(&self, told: Told) -> Result<(), lease::Error> {
        use tokio::sync::mpsc::error::TrySendError;
        match self.told.try_send(told) {
            Ok(()) => Ok(()),
            // Its task has ended; the event is on its way.
            Err(TrySendError::Closed(_)) => Ok(()),
            // Nothing may be dropped: after a reconnect everything is said again.
            Err(TrySendError::Full(_)) => Err(lease::Error::Stuck),
        }
    }
}
