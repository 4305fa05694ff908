//! `fan_in`: many idle runners: what a connection takes, what heartbeats cost, what happens when
//! all come back at once. Beside it as many streams of a bare server.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::bare::Bare;
use crate::bed::Bed;
use crate::observed::{processor_time, raise_open_files, resident};
use crate::row::{Budget, Context, Figure, Limit, Measurement, Row};
use latchkey_harness::simulated_runner::{Identity, Listener, SimulatedRunner};

pub(crate) const MEASUREMENT: Measurement = Measurement {
    name: "fan_in",
    what: "1,000 and 10,000 idle runners: memory, heartbeats, reconnecting",
    measure: |context| Box::pin(measure(context)),
};

/// How long one that was turned away waits before it comes again; a real runner's first wait is of
/// this order, with jitter.
const AGAIN: Duration = Duration::from_millis(250);
/// How long one keeps coming.
const COMING: Duration = Duration::from_secs(120);
/// For what the handshakes left to do.
const SETTLING: Duration = Duration::from_millis(300);
/// The share of a core that heartbeats of 10,000 runners may take.
const CORE: f64 = 0.1;
const MANY: usize = 10_000;

async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let sizes: &[usize] = if context.quick { &[1000] } else { &[1000, MANY] };
    for count in sizes {
        rows.extend(of(*count, context).await?);
    }
    Ok(rows)
}

async fn of(count: usize, context: &Context) -> anyhow::Result<Vec<Row>> {
    // Before the servers start, who inherit it. Two crowds of clients are in this process.
    let (before, raised) = raise_open_files(count as u64 + 500)?;
    let period = Duration::from_secs(context.pick(3, 30) as u64);
    let mut bed = Bed::start().await?;
    let bare = Bare::start(bed.plane.ca_file()).await?;
    let identities = bed.enroll(count).await?;

    let ours = crowd(bed.pid()?, &bed.listener()?, &identities, period).await?;
    bed.plane.kill().await?;
    bed.plane.restart().await?;
    let back = Crowd::connect(bed.pid()?, &bed.listener()?, &identities).await?;
    drop(back.idle);
    bed.plane.stop().await?;
    let theirs = crowd(bare.pid()?, &bare.listener, &identities, period).await?;
    let bare_back = Crowd::connect(bare.pid()?, &bare.listener, &identities).await?;

    let raised = if raised > before {
        format!("Open files were raised from {before} to {raised} for each process (RLIMIT_NOFILE)")
    } else {
        format!("{before} open files for each process were enough")
    };
    let how = format!(
        "{count} simulated runners in one client process, a TLS connection with a client \
         certificate of its own and one `Lease` stream each, keep-alives as the real runner's. \
         {raised}; enrolled over one connection with a key each."
    );
    let limit = |what, figure| Some(Limit { what, figure });
    Ok(vec![
        Row {
            name: format!("fan_in, memory of each of {count}"),
            figure: Figure::kibibytes(ours.memory / count as f64),
            limit: limit("bare tonic stream", Figure::kibibytes(theirs.memory / count as f64)),
            budget: Budget::RatioAtMost(1.5),
            note: format!(
                "{how} Growth of the server's VmRSS from no runner to all connected, divided. \
                 It includes what the handshakes of all at once left in the allocator, in both. \
                 The same for each runner at 10 times the number; at 100 times (100,000) the \
                 open files of one process and the handshakes after a restart are what has to be \
                 split first."
            ),
        },
        Row {
            name: format!("fan_in, heartbeats of {count}"),
            figure: Figure { value: ours.cores, unit: "cores" },
            limit: limit("bare tonic stream", Figure { value: theirs.cores, unit: "cores" }),
            budget: Budget::FigureAtMost(CORE),
            note: format!(
                "Time that the server's threads ran over {} s, by /proc/PID/task/*/schedstat: a \
                 heartbeat of each runner every 10 s, evenly spread, with its answer, and the \
                 HTTP/2 pings of both sides. All else that the server does when idle is within. \
                 The budget is meant for \
                 10,000. Few heartbeats cost more each, since every one wakes a sleeping thread; \
                 many share the wakes. So 10 times the runners is less than 10 times the time, \
                 and 100,000 would take most of a core.",
                period.as_secs()
            ),
        },
        Row {
            name: format!("fan_in, {count} reconnecting at once"),
            figure: Figure::millis(back.taken),
            limit: limit("bare tonic stream", Figure::millis(bare_back.taken)),
            budget: Budget::None,
            note: format!(
                "After SIGKILL and a restart of the control plane: from ready until the last of \
                 {count} has its `Welcome`, all begun at once without the real runner's jitter. The \
                 control plane has a bound on connections that are being opened, and turned {} \
                 attempts away (the bare server, which has none: {}); who is turned away comes \
                 again after {} ms. Client and server share the cores, and a TLS handshake with a client certificate on each side is most of it. The server's \
                 threads ran {}, the bare server's {}. The first connecting took {}. Linear in \
                 the number.",
                back.turned_away,
                bare_back.turned_away,
                AGAIN.as_millis(),
                Figure::millis(back.ran),
                Figure::millis(bare_back.ran),
                Figure::millis(ours.taken)
            ),
        },
    ])
}

/// What a crowd cost its server.
struct Cost {
    memory: f64,
    cores: f64,
    taken: Duration,
}

async fn crowd(
    pid: i32,
    listener: &Listener,
    identities: &[Identity],
    period: Duration,
) -> anyhow::Result<Cost> {
    let empty = resident(pid)?;
    let crowd = Crowd::connect(pid, listener, identities).await?;
    tokio::time::sleep(SETTLING).await;
    let memory = resident(pid)? as f64 - empty as f64;
    let (begun, before) = (Instant::now(), processor_time(pid)?);
    tokio::time::sleep(period).await;
    let ran = processor_time(pid)?.saturating_sub(before);
    let cores = ran.as_secs_f64() / begun.elapsed().as_secs_f64();
    let mut idle = crowd.idle;
    if let Some(ended) = idle.try_join_next() {
        ended??;
    }
    idle.shutdown().await;
    Ok(Cost { memory, cores, taken: crowd.taken })
}

/// Connected runners; they leave when it is dropped.
struct Crowd {
    idle: JoinSet<anyhow::Result<()>>,
    /// From the first to the last welcome.
    taken: Duration,
    /// How long the server's threads ran meanwhile.
    ran: Duration,
    /// Attempts that came to nothing.
    turned_away: usize,
}

impl Crowd {
    /// Connects all at once.
    async fn connect(
        pid: i32,
        listener: &Listener,
        identities: &[Identity],
    ) -> anyhow::Result<Self> {
        let (begun, before) = (Instant::now(), processor_time(pid)?);
        let mut connecting = JoinSet::new();
        for (number, identity) in identities.iter().enumerate() {
            let (listener, identity) = (listener.clone(), identity.clone());
            let phase = number as f64 / identities.len() as f64;
            connecting.spawn(async move {
                let mut turned_away = 0;
                loop {
                    match SimulatedRunner::connect(&listener, &identity, 1).await {
                        Ok(runner) => return anyhow::Ok((runner, phase, turned_away)),
                        Err(error) if begun.elapsed() > COMING => return Err(error),
                        Err(_) => turned_away += 1,
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            });
        }
        let mut connected = Vec::with_capacity(identities.len());
        while let Some(one) = connecting.join_next().await {
            connected.push(one??);
        }
        let taken = begun.elapsed();
        let ran = processor_time(pid)?.saturating_sub(before);
        let (mut idle, mut turned_away) = (JoinSet::new(), 0);
        for (runner, phase, times) in connected {
            idle.spawn(runner.idle(phase));
            turned_away += times;
        }
        Ok(Self { idle, taken, ran, turned_away })
    }
}
