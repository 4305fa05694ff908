//! `RunnerService`: the runners' side of leases and of bulk data.
//!
//! This file knows who calls and ends every stream of a runner that is revoked. The lease stream
//! is in [`lease`], bulk data in [`bulk`], the conversions of both in [`wire`].

mod bulk;
mod lease;
mod wire;

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as In;
use latchkey_proto::v1::runner_service_server::RunnerService;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::places::Place;
use super::revocable::{unless_revoked, until_revoked};
use super::{Answers, Service, next_part_within, send_within};
use crate::auth::RunnerIdentity;
use crate::dispatch::RUNNER_QUEUE;
use crate::error::Error;

#[tonic::async_trait]
impl RunnerService for Service {
    type LeaseStream = Answers<v1::LeaseResponse>;
    type FetchArtifactStream = Answers<v1::FetchArtifactResponse>;
    type AppendLogStream = Answers<v1::AppendLogResponse>;

    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        self.app.check_history()?;
        let v1::EnrollRequest { pool_token, certificate_request, name } = request.into_inner();
        let enrolled = self.app.enroll(&pool_token.into(), &certificate_request, &name).await?;
        Ok(Response::new(v1::EnrollResponse {
            runner_id: enrolled.runner.to_string(),
            certificate: enrolled.issued.certificate.to_vec(),
            ca_certificate: enrolled.issued.ca_certificate.to_vec(),
        }))
    }

    async fn lease(
        &self,
        mut request: Request<Streaming<v1::LeaseRequest>>,
    ) -> Result<Response<Self::LeaseStream>, Status> {
        let runner = identity(&request)?;
        let place = Place::of(&mut request);
        let mut frames = request.into_inner();
        let first = next_part_within(place.patience(), &mut frames).await?;
        let hello = match first.and_then(|first| first.frame) {
            Some(In::Hello(hello)) => hello,
            Some(_) | None => {
                return Err(Error::field("frame", "the first frame is Hello").into());
            }
        };
        let revocation = self.app.revocations.of(runner.id);
        let (answers, outgoing) = mpsc::channel(RUNNER_QUEUE);
        let (service, revoked) = (self.clone(), revocation.clone());
        tokio::spawn(async move {
            let sender = answers.clone();
            let budget = place.introductions();
            let held = service.hold_leases(runner, hello, frames, answers, revoked, budget).await;
            if let Err(status) = held {
                let _ = send_within(place.patience(), &sender, Err(status)).await;
            }
        });
        let outgoing = ReceiverStream::new(outgoing).map(|answer| answer.map(|boxed| *boxed));
        Ok(Response::new(until_revoked(revocation, outgoing)))
    }

    async fn fetch_artifact(
        &self,
        mut request: Request<v1::FetchArtifactRequest>,
    ) -> Result<Response<Self::FetchArtifactStream>, Status> {
        let runner = identity(&request)?;
        let place = Place::of(&mut request);
        let revocation = self.app.revocations.of(runner.id);
        let parts = self.send_artifact(&runner, request.into_inner(), place).await?;
        Ok(Response::new(until_revoked(revocation, parts)))
    }

    async fn upload_artifact(
        &self,
        mut request: Request<Streaming<v1::UploadArtifactRequest>>,
    ) -> Result<Response<v1::UploadArtifactResponse>, Status> {
        let runner = identity(&request)?;
        let place = Place::of(&mut request);
        let revocation = self.app.revocations.of(runner.id);
        unless_revoked(revocation, self.take_upload(&runner, request.into_inner(), &place)).await
    }

    async fn append_log(
        &self,
        mut request: Request<Streaming<v1::AppendLogRequest>>,
    ) -> Result<Response<Self::AppendLogStream>, Status> {
        let runner = identity(&request)?;
        let place = Place::of(&mut request);
        let revocation = self.app.revocations.of(runner.id);
        let revoked = revocation.clone();
        let chunks = request.into_inner();
        let app = std::sync::Arc::clone(&self.app);
        let (sender, answers) = mpsc::channel(16);
        tokio::spawn(async move {
            let append = bulk::append(app, runner, chunks, sender.clone(), place.patience());
            if let Err(status) = unless_revoked(revoked, append).await {
                let _ = send_within(place.patience(), &sender, Err(status)).await;
            }
        });
        Ok(Response::new(until_revoked(revocation, ReceiverStream::new(answers))))
    }
}

fn identity<T>(request: &Request<T>) -> Result<RunnerIdentity, Status> {
    let identity = request.extensions().get::<RunnerIdentity>().cloned();
    identity.ok_or_else(|| Error::internal("the layer let an unproved runner pass").into())
}

#[cfg(test)]
mod tests;
