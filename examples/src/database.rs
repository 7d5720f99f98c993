//! The slow source of truth that the cache stands before: a file of products, 20 ms away.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What the shop sells.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Product {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) category: String,
    pub(crate) price_cents: u32,
    stock: u32,
    weight_grams: u32,
    description: String,
}

/// A query failed.
#[derive(Debug)]
pub(crate) struct DatabaseError(String);

impl std::fmt::Display for DatabaseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for DatabaseError {}

/// How long a query takes.
const LATENCY: Duration = Duration::from_millis(20);

pub(crate) struct Database {
    products: Mutex<HashMap<u32, Product>>,
    queries: AtomicU64,
    down: AtomicBool,
}

impl Database {
    /// Reads the products of `examples/data`.
    pub(crate) fn open() -> Result<Self, DatabaseError> {
        let lines = include_str!("../data/products.jsonl").lines();
        let products = lines.map(|line| serde_json::from_str(line).map(|product: Product| (product.id, product)));
        let products =
            products.collect::<Result<_, _>>().map_err(|error| DatabaseError(format!("products.jsonl: {error}")))?;
        Ok(Self { products: Mutex::new(products), queries: AtomicU64::new(0), down: AtomicBool::new(false) })
    }

    pub(crate) async fn product(&self, id: u32) -> Result<Product, DatabaseError> {
        self.queries.fetch_add(1, Ordering::Relaxed);
        #[allow(clippy::disallowed_methods, reason = "the latency of a real database")]
        tokio::time::sleep(LATENCY).await;
        if self.down.load(Ordering::Relaxed) {
            return Err(DatabaseError("connection refused".to_owned()));
        }
        self.products().get(&id).cloned().ok_or_else(|| DatabaseError(format!("there is no product {id}")))
    }

    pub(crate) fn reprice(&self, id: u32, price_cents: u32) {
        if let Some(product) = self.products().get_mut(&id) {
            product.price_cents = price_cents;
        }
    }

    pub(crate) fn take_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    pub(crate) fn queries(&self) -> u64 {
        self.queries.load(Ordering::Relaxed)
    }

    fn products(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Product>> {
        self.products.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
