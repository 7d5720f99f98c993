//! A standalone server, a Sentinel's primary or a cluster, behind one set of calls.

use std::collections::HashMap;
use std::sync::Arc;

use redis::{Cmd, ErrorKind, Pipeline, RedisError, RedisResult, ServerErrorKind, Value};

use super::cluster::{Cluster, SLOTS, slot};
use super::config::RedisConfig;
use super::link::{Connected, Link};
use crate::doubts::Doubts;
use crate::runtime::Runtime;

pub(crate) struct Servers {
    kind: Kind,
    pub(crate) lives: Arc<Doubts>,
}

enum Kind {
    One(Arc<Link>),
    Cluster(Arc<Cluster>),
}

/// How often one call follows a cluster's redirections.
const REDIRECTIONS: usize = 3;

impl Servers {
    pub(crate) fn new(config: &Arc<RedisConfig>, runtime: &Arc<dyn Runtime>) -> Self {
        let lives = Arc::new(Doubts::default());
        let (config, runtime) = (Arc::clone(config), Arc::clone(runtime));
        let kind = if config.is_cluster() {
            Kind::Cluster(Cluster::new(config, runtime, Arc::clone(&lives)))
        } else {
            Kind::One(Link::new(config, runtime, None, Arc::clone(&lives)))
        };
        Self { kind, lives }
    }

    /// Sends a command that concerns `key`, the only one it names.
    pub(crate) async fn command(&self, key: &str, command: &Cmd, settled_only: bool) -> RedisResult<Value> {
        match &self.kind {
            Kind::One(link) => link.command(command, settled_only).await,
            // Boxed, so that a single server's calls do not carry it.
            Kind::Cluster(cluster) => Box::pin(follow(cluster, slot(key.as_bytes()), command, settled_only)).await,
        }
    }

    /// Sends commands that each concern their own key, one round trip for each server. An answer for each, in order:
    /// the servers that fail do not take the others' answers with them.
    pub(crate) async fn commands(&self, commands: Vec<(&str, Cmd)>, settled_only: bool) -> Vec<RedisResult<Value>> {
        match &self.kind {
            Kind::One(link) => {
                let mut pipeline = redis::Pipeline::with_capacity(commands.len());
                let count = commands.len();
                commands.into_iter().for_each(|(_, command)| {
                    pipeline.add_command(command);
                });
                spread(link.pipeline(&pipeline, settled_only).await, count)
            }
            Kind::Cluster(cluster) => {
                // Each server's share of the commands.
                let mut shares: HashMap<usize, (Arc<Link>, Vec<usize>)> = HashMap::new();
                let mut answers: Vec<Option<RedisResult<Value>>> = Vec::new();
                for (index, (key, _)) in commands.iter().enumerate() {
                    match cluster.owner(slot(key.as_bytes())).await {
                        Ok(link) => {
                            let share = Arc::as_ptr(&link) as usize;
                            shares.entry(share).or_insert_with(|| (link, Vec::new())).1.push(index);
                            answers.push(None);
                        }
                        Err(error) => answers.push(Some(Err(error))),
                    }
                }
                let calls = shares.into_values().map(|(link, indices)| {
                    let mut pipeline = redis::Pipeline::with_capacity(indices.len());
                    indices.iter().for_each(|index| {
                        pipeline.add_command(commands[*index].1.clone());
                    });
                    async move { (spread(link.pipeline(&pipeline, settled_only).await, indices.len()), indices) }
                });
                for (outcomes, indices) in futures_util::future::join_all(calls).await {
                    for (outcome, index) in outcomes.into_iter().zip(indices) {
                        let (key, command) = &commands[index];
                        answers[index] = Some(match outcome {
                            Err(error) if is_redirection(&error) => {
                                follow(cluster, slot(key.as_bytes()), command, settled_only).await
                            }
                            Err(error) => {
                                doubt(cluster, &error);
                                Err(error)
                            }
                            Ok(value) => Ok(value),
                        });
                    }
                }
                let lost = || Err((ErrorKind::Client, "a reply is missing").into());
                answers.into_iter().map(|answer| answer.unwrap_or_else(lost)).collect()
            }
        }
    }

    /// Sends a transaction whose keys are all on the server of `key`.
    pub(crate) async fn transaction(&self, key: &str, transaction: &Pipeline) -> RedisResult<()> {
        let link = self.holder(key).await?;
        link.pipeline(transaction, false).await?.into_iter().try_for_each(|reply| reply.extract_error().map(drop))
    }

    /// A connection to the server of `key`, apart from the shared one: for a command that blocks.
    pub(crate) async fn connect(&self, key: &str) -> RedisResult<Connected> {
        self.holder(key).await?.connect().await.inspect_err(|error| self.note(error))
    }

    /// What an error on a connection of its own says about who holds what.
    pub(crate) fn note(&self, error: &RedisError) {
        if let Kind::Cluster(cluster) = &self.kind {
            doubt(cluster, error);
        }
    }

    /// The life's name of the server that holds `key`.
    pub(crate) async fn run_id(&self, key: &str) -> RedisResult<String> {
        Ok(self.holder(key).await?.identity().await?.run_id)
    }

    async fn holder(&self, key: &str) -> RedisResult<Arc<Link>> {
        match &self.kind {
            Kind::One(link) => Ok(Arc::clone(link)),
            Kind::Cluster(cluster) => cluster.owner(slot(key.as_bytes())).await,
        }
    }

    pub(crate) fn is_cluster(&self) -> bool {
        matches!(self.kind, Kind::Cluster(_))
    }

    /// In how many parts the keys fail apart from each other.
    pub(crate) fn parts(&self) -> usize {
        if self.is_cluster() { PARTS } else { 1 }
    }

    pub(crate) fn part(&self, key: &str) -> usize {
        if self.is_cluster() { part_of(key) } else { 0 }
    }

    pub(crate) fn close(&self) {
        match &self.kind {
            Kind::One(link) => link.close(),
            Kind::Cluster(cluster) => cluster.close(),
        }
    }
}

/// A cluster's slots in equal parts: some are on one server, few on two.
const PARTS: usize = 16;

fn part_of(key: &str) -> usize {
    usize::from(slot(key.as_bytes())) * PARTS / SLOTS
}

/// The text for a key's braces that puts it into a part of the slots.
pub(crate) fn tag_of_part(part: usize) -> String {
    let mut tags = (0..u64::MAX).map(|number| number.to_string());
    tags.find(|tag| part_of(tag) == part).unwrap_or_default()
}

async fn follow(cluster: &Arc<Cluster>, slot: u16, command: &Cmd, settled_only: bool) -> RedisResult<Value> {
    let mut link = cluster.owner(slot).await?;
    let mut asking = false;
    for _ in 0..REDIRECTIONS {
        let outcome = if asking {
            let mut pipeline = redis::Pipeline::with_capacity(2);
            pipeline.cmd("ASKING").add_command(command.clone());
            let replies = link.pipeline(&pipeline, settled_only).await;
            replies.and_then(|mut replies| replies.pop().unwrap_or(Value::Nil).extract_error())
        } else {
            link.command(command, settled_only).await
        };
        let Err(error) = outcome else { return outcome };
        let Some((address, _)) = error.redirect_node() else {
            doubt(cluster, &error);
            return Err(error);
        };
        asking = error.kind() == ErrorKind::Server(ServerErrorKind::Ask);
        if asking {
            link = cluster.at(address)?;
        } else {
            cluster.doubt();
            link = cluster.owner(slot).await?;
        }
    }
    Err((ErrorKind::Client, "the cluster redirects in circles").into())
}

/// A server that cannot be reached, or is no primary any more, may have been replaced.
fn doubt(cluster: &Cluster, error: &RedisError) {
    use ServerErrorKind as Server;
    let refused = matches!(error.kind(), ErrorKind::Server(Server::NoPerm | Server::ResponseError | Server::NoScript));
    if !refused && error.kind() != ErrorKind::Extension {
        cluster.doubt();
    }
}

fn is_redirection(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(ServerErrorKind::Ask | ServerErrorKind::Moved))
}

/// One outcome for each command of a pipeline.
fn spread(outcome: RedisResult<Vec<Value>>, count: usize) -> Vec<RedisResult<Value>> {
    match outcome {
        Ok(values) if values.len() == count => values.into_iter().map(Value::extract_error).collect(),
        Ok(_) => vec![Err((ErrorKind::Client, "a reply is missing").into()); count],
        Err(error) => vec![Err(error); count],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_slots_has_a_tag() {
        for part in 0..PARTS {
            let key = format!("any:{{{}}}", tag_of_part(part));
            assert_eq!(usize::from(slot(key.as_bytes())) * PARTS / SLOTS, part);
        }
    }
}
