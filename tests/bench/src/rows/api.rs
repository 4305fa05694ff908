//! `api`: calls per second by 64 callers, each with a TLS connection of its own, beside empty
//! calls against a bare server.

use std::future::Future;
use std::time::{Duration, Instant};

use latchkey_harness::{Configuration, Person};
use latchkey_proto::v1;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use tokio::task::JoinSet;
use tonic::Status;

use crate::bare::Bare;
use crate::bed::Bed;
use crate::row::{Budget, Context, Figure, Limit, Measurement, Row, percentile};

pub(crate) const MEASUREMENT: Measurement = Measurement {
    name: "api",
    what: "GetRun and QueueRun calls per second, 64 callers over TLS",
    measure: |context| Box::pin(measure(context)),
};

const CALLERS: usize = 64;

async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let span = Duration::from_millis(context.pick(800, 5000) as u64);
    let bed = Bed::start().await?;
    let environments = bed.environments(CALLERS).await?;
    let main = r#"resource "terraform_data" "one" {}"#;
    let archive = Configuration::of(&[("main.tf", main)]);
    let digest = bed.owner.upload(&environments[0], &archive).await?;
    let mut callers = Vec::new();
    for environment in environments {
        let owner = &bed.owner;
        let person =
            Person::with_token(&bed.plane, &owner.organization, &owner.name, owner.token())?;
        // One that has ended: what a run page shows most.
        let request = Bed::queue(&environment, &digest);
        let run = person.runs().queue_run(request).await?.into_inner().run.unwrap_or_default();
        person
            .runs()
            .cancel(v1::CancelRequest { run_id: run.run_id.clone(), force: false })
            .await?;
        callers.push((person, environment, run.run_id));
    }

    let bare = Bare::start(bed.plane.ca_file()).await?;
    let mut empty = Vec::new();
    for _ in 0..CALLERS {
        empty.push(RunnerServiceClient::new(bare.listener.endpoint(None)?.connect().await?));
    }
    let limit = load(&empty, span, |mut client, _| async move {
        client.enroll(v1::EnrollRequest::default()).await.map(drop)
    })
    .await?;
    let get = load(&callers, span, |(person, _, run_id), _| async move {
        person.runs().get_run(v1::GetRunRequest { run_id }).await.map(drop)
    })
    .await?;
    let queue = load(&callers, span, move |(person, environment, _), _| {
        let request = Bed::queue(&environment, &digest);
        async move { person.runs().queue_run(request).await.map(drop) }
    })
    .await?;

    let row = |name: &str, loaded: &Loaded, note: &str| Row {
        name: format!("api, {name}"),
        figure: loaded.rate,
        limit: Some(Limit { what: "empty tonic calls", figure: limit.rate }),
        budget: Budget::None,
        note: format!(
            "{CALLERS} callers, a connection each, one call at a time; p50 {}, p99 {}. The limit \
             is `Enroll` answered empty by a bare server, p99 {}; clients and server share the \
             machine's cores in both. {note}",
            loaded.p50, loaded.p99, limit.p99
        ),
    };
    Ok(vec![
        row(
            "GetRun",
            &get,
            "Of runs that ended; five records are fetched for each call (token, run, membership, \
             organization, environment). Calls cost the same at 10 and 100 times the callers, who \
             then wait in line; 100 times the runs are the row *history*.",
        ),
        row(
            "QueueRun",
            &queue,
            "Each answer waits for its own durable commit, shared with those of the other \
             callers. 64 environments: the first run of each has its turn, all others wait \
             behind it. A run that must wait has its environment's waiting runs listed, so the \
             cost of a call grows with the length of that line: 10 times the line is 10 times \
             that part.",
        ),
    ])
}

struct Loaded {
    rate: Figure,
    p50: Figure,
    p99: Figure,
}

/// Lets every caller call again and again for a while. The first call of each, which connects,
/// is not counted.
async fn load<C, F, A>(callers: &[C], span: Duration, call: F) -> anyhow::Result<Loaded>
where
    C: Clone + Send + 'static,
    F: Fn(C, usize) -> A + Clone + Send + 'static,
    A: Future<Output = Result<(), Status>> + Send,
{
    let ready = std::sync::Arc::new(tokio::sync::Barrier::new(callers.len() + 1));
    let mut calling = JoinSet::new();
    for caller in callers {
        let (caller, call, ready) = (caller.clone(), call.clone(), std::sync::Arc::clone(&ready));
        calling.spawn(async move {
            let first = call(caller.clone(), 0).await;
            ready.wait().await;
            first?;
            let mut samples = Vec::new();
            let begun = Instant::now();
            while begun.elapsed() < span {
                let called = Instant::now();
                call(caller.clone(), samples.len() + 1).await?;
                samples.push(called.elapsed());
            }
            Ok::<_, Status>(samples)
        });
    }
    ready.wait().await;
    let begun = Instant::now();
    let mut samples = Vec::new();
    while let Some(caller) = calling.join_next().await {
        samples.extend(caller??);
    }
    let taken = begun.elapsed();
    Ok(Loaded {
        rate: Figure::per_second(samples.len(), taken),
        p50: Figure::millis(percentile(&mut samples, 0.5)),
        p99: Figure::millis(percentile(&mut samples, 0.99)),
    })
}
