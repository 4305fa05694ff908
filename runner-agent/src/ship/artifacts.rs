//! Files, whole: what a job needs comes, what it made goes.

use std::io;
use std::path::Path;

use latchkey_proto::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::attempts::Attempts;
use super::{Delivery, Error, Failure, Shipper, in_time, understand};
use crate::digest::{self, Digester};
use crate::job_directory::create_private;

const UPLOAD_PIECE: usize = 256 * 1024;

pub(crate) enum Fetched {
    Digest(String),
    LeaseLost,
    Refused(String),
}

impl Shipper {
    /// Fetches what the job needs into a file.
    pub(crate) async fn fetch(&self, kind: v1::ArtifactKind, to: &Path) -> Result<Fetched, Error> {
        let mut attempts = Attempts::at("fetch an artifact");
        loop {
            match self.fetch_once(kind, to).await {
                Ok(digest) => return Ok(Fetched::Digest(digest)),
                Err(Failure::LeaseLost) => return Ok(Fetched::LeaseLost),
                Err(Failure::Refused(reason)) => return Ok(Fetched::Refused(reason)),
                Err(Failure::Local(error)) => return Err(error),
                Err(failure @ (Failure::Again(_) | Failure::Offset(_))) => {
                    self.pause(&mut attempts, &failure).await;
                }
            }
        }
    }

    async fn fetch_once(&self, kind: v1::ArtifactKind, to: &Path) -> Result<String, Failure> {
        let keep = |error| Failure::Local(Error::Keep(error));
        let request =
            v1::FetchArtifactRequest { lease: Some(self.lease.to_wire()), kind: kind.into() };
        let mut client = self.client.clone();
        let mut pieces = in_time(client.fetch_artifact(request)).await?.into_inner();
        let mut file = tokio::fs::File::from_std(create_private(to).map_err(keep)?);
        let mut digester = Digester::new();
        while let Some(piece) = in_time(pieces.message()).await? {
            digester.update(&piece.data);
            file.write_all(&piece.data).await.map_err(keep)?;
        }
        file.flush().await.map_err(keep)?;
        Ok(digester.finish())
    }

    pub(super) async fn header(
        &self,
        kind: v1::ArtifactKind,
        path: &Path,
        sequence: u64,
    ) -> Result<v1::ArtifactHeader, Error> {
        let of = path.to_owned();
        let digest = tokio::task::spawn_blocking(move || digest::of_file(&of))
            .await
            .map_err(|error| Error::Read(io::Error::other(error)))?
            .map_err(Error::Read)?;
        let size = std::fs::metadata(path).map_err(Error::Read)?.len();
        let lease = Some(self.lease.to_wire());
        Ok(v1::ArtifactHeader { lease, kind: kind.into(), digest, size, sequence })
    }

    pub(super) async fn upload(
        &self,
        kind: v1::ArtifactKind,
        path: &Path,
        sequence: u64,
    ) -> Result<Delivery, Error> {
        let header = self.header(kind, path, sequence).await?;
        let mut attempts = Attempts::at("upload an artifact");
        loop {
            match self.upload_once(&header, path).await {
                Ok(()) => return Ok(Delivery::Acknowledged),
                Err(Failure::Refused(reason)) => return Ok(Delivery::Refused(reason)),
                Err(Failure::Local(error)) => return Err(error),
                Err(failure @ (Failure::Again(_) | Failure::Offset(_) | Failure::LeaseLost)) => {
                    self.pause(&mut attempts, &failure).await;
                }
            }
        }
    }

    pub(super) async fn upload_once(
        &self,
        header: &v1::ArtifactHeader,
        path: &Path,
    ) -> Result<(), Failure> {
        use v1::upload_artifact_request::Part;
        let read = |error| Failure::Local(Error::Read(error));
        let mut file = tokio::fs::File::open(path).await.map_err(read)?;
        let (parts, inbox) = mpsc::channel(4);
        let part = |part| v1::UploadArtifactRequest { part: Some(part) };
        let header = part(Part::Header(header.clone()));
        let feed = async move {
            // A closed channel means that the answer is there already.
            if parts.send(header).await.is_err() {
                return Ok(());
            }
            loop {
                let mut piece = Vec::with_capacity(UPLOAD_PIECE);
                (&mut file)
                    .take(UPLOAD_PIECE as u64)
                    .read_to_end(&mut piece)
                    .await
                    .map_err(read)?;
                if piece.is_empty() || parts.send(part(Part::Data(piece))).await.is_err() {
                    return Ok(());
                }
            }
        };
        let mut client = self.client.clone();
        let call = async {
            let answer = client.upload_artifact(ReceiverStream::new(inbox)).await;
            answer.map(drop).map_err(|refusal| understand(&refusal))
        };
        let (fed, answered) = tokio::join!(feed, call);
        fed.and(answered)
    }
}
