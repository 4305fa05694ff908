//! `audit`: the chained record of who did what.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use clap::Subcommand;
use uuid::Uuid;

use latchkey_proto::{audit, v1};

use crate::Done;
use crate::audit_export::{self, Known, Unconfirmed};
use crate::client::Client;
use crate::context::{Context, Session};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::view::account::{AuditListView, AuditRecordView, ExportCheckView, VerificationView};
use crate::words::parse_moment;

#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// Lists the records, oldest first; owners only
    List(Filter),
    /// Writes the records as JSON lines to standard output; owners only
    ///
    /// One line per record, with all that its digest covers: format, organization, sequence, time,
    /// previous, actor, action, subject, details and digest, in this order and without spaces. The
    /// digest is the SHA-256 of the record's canonical form, which begins with the digest of the
    /// record before it. Note the head that is told at the end somewhere else: `audit verify --file
    /// EXPORT --head DIGEST --organization-id UUID` then finds also what was cut off, written anew
    /// or is somebody else's.
    Export {
        /// The first number to write
        #[arg(long, value_name = "NUMBER", default_value_t = 1,
            value_parser = clap::value_parser!(u64).range(1..))]
        from: u64,
    },
    /// Walks the whole chain; fails when it is broken
    ///
    /// Without --file the control plane walks its own records; owners only. With it, the export is
    /// checked here: no control plane is asked and no sign-in is needed.
    Verify {
        /// An export to check; `-` is standard input
        #[arg(long, value_name = "EXPORT")]
        file: Option<PathBuf>,
        /// A digest noted earlier, which a record of the export must have
        #[arg(long, value_name = "DIGEST", requires = "file", value_parser = parse_digest)]
        head: Option<String>,
        /// Whose export it has to be, by the id that an earlier check or export told
        #[arg(long, value_name = "UUID", requires = "file")]
        organization_id: Option<Uuid>,
    },
}

/// Which records; all that is given must hold.
#[derive(Debug, clap::Args)]
pub(crate) struct Filter {
    /// Only records about this run
    #[arg(long)]
    run: Option<String>,
    /// Only what they did, such as `ada`, `user ada` or `system`
    #[arg(long)]
    actor: Option<String>,
    /// Only this, such as `confirm_run`
    #[arg(long)]
    action: Option<String>,
    /// Only records whose subject begins so, such as `pool `
    #[arg(long, value_name = "PREFIX")]
    subject: Option<String>,
    /// Only records about this environment and its runs
    #[arg(long = "env", value_name = "ENV")]
    environment: Option<String>,
    /// Not before: a time such as 2026-11-24T12:00:00Z, or how long ago, such as 24h
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    since: Option<prost_types::Timestamp>,
    /// Before: as --since
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    until: Option<prost_types::Timestamp>,
}

impl Audit {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        match self {
            Audit::List(filter) => {
                let session = context.session()?;
                let organization = session.organization()?;
                list(context, &session.client, filter.request(organization)).await
            }
            Audit::Export { from } => {
                let session = context.session()?;
                export(context, &session, from).await
            }
            Audit::Verify { file: Some(file), head, organization_id } => {
                verify_file(context, &file, Known { head, organization: organization_id }).await
            }
            Audit::Verify { file: None, head: _, organization_id: _ } => {
                let session = context.session()?;
                let (client, organization) = (&session.client, session.organization()?);
                let request = v1::VerifyAuditRequest { organization };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.audit(), request.clone());
                        async move { service.verify_audit(request).await }
                    })
                    .await?;
                let view = VerificationView::new(&answer);
                context.output.data(&view, VerificationView::human)?;
                Ok(if answer.intact { Exit::Ok } else { Exit::Refused })
            }
        }
    }
}

impl Filter {
    fn request(self, organization: String) -> v1::ListAuditRecordsRequest {
        v1::ListAuditRecordsRequest {
            organization,
            page_size: 200,
            page_token: String::new(),
            run_id: self.run.unwrap_or_default(),
            actor: self.actor.unwrap_or_default(),
            action: self.action.unwrap_or_default(),
            subject_prefix: self.subject.unwrap_or_default(),
            environment: self.environment.unwrap_or_default(),
            from_time: self.since,
            until_time: self.until,
        }
    }
}

async fn list(
    context: &mut Context,
    client: &Client,
    mut request: v1::ListAuditRecordsRequest,
) -> Done {
    let mut records = Vec::new();
    loop {
        let page = client
            .call(|| {
                let (mut service, request) = (client.audit(), request.clone());
                async move { service.list_audit_records(request).await }
            })
            .await?;
        records.extend(page.records.iter().map(AuditRecordView::new));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    context.output.data(&AuditListView { records }, AuditListView::human)?;
    Ok(Exit::Ok)
}

async fn export(context: &mut Context, session: &Session, from: u64) -> Done {
    let client = &session.client;
    let request =
        v1::ExportAuditRequest { organization: session.organization()?, from_sequence: from };
    let mut parts = client
        .call(|| {
            let (mut service, request) = (client.audit(), request.clone());
            async move { service.export_audit(request).await }
        })
        .await?;
    let mut last = None;
    while let Some(part) = parts.message().await.map_err(|status| client.failure(&status))? {
        for record in part.records {
            let line = audit_export::line(&record).ok_or_else(|| Failure::Usage {
                message: format!("record {} has no form that can be exported", record.sequence),
                hint: "use the same version of latchkey as the control plane's".into(),
            })?;
            context.output.text(&line)?;
            last = Some((record.sequence, record.digest, record.organization_id));
        }
    }
    let told = match last {
        Some((sequence, digest, organization)) => format!(
            "exported up to record {sequence} of the organization {organization}; note that and \
             its digest elsewhere: {digest}"
        ),
        None => "there are no such records".to_owned(),
    };
    context.output.hint(&told);
    Ok(Exit::Ok)
}

async fn verify_file(context: &mut Context, file: &Path, known: Known) -> Done {
    let path = file.to_owned();
    let check = move || {
        let export: Box<dyn BufRead> = if path.as_os_str() == "-" {
            Box::new(io::stdin().lock())
        } else {
            Box::new(BufReader::new(File::open(&path)?))
        };
        audit_export::check(export, &known)
    };
    let outcome = match tokio::task::spawn_blocking(check).await {
        Ok(outcome) => outcome,
        Err(panicked) => Err(Unconfirmed::Read(io::Error::other(panicked))),
    };
    let view = match outcome {
        Ok(checked) => ExportCheckView::confirmed(&checked),
        Err(Unconfirmed::Broken { sequence, fault }) => {
            ExportCheckView::broken(sequence, fault.to_string())
        }
        Err(Unconfirmed::Read(error)) => {
            return Err(Failure::Usage {
                message: format!("cannot read {}: {error}", file.display()),
                hint: "name a file that `latchkey audit export` wrote".into(),
            });
        }
    };
    context.output.data(&view, ExportCheckView::human)?;
    Ok(if view.intact() { Exit::Ok } else { Exit::Refused })
}

fn parse_digest(text: &str) -> Result<String, String> {
    let text = text.to_lowercase();
    match audit::from_hex(&text) {
        Some(_) => Ok(text),
        None => Err("not a digest: 64 hexadecimal digits".to_owned()),
    }
}
