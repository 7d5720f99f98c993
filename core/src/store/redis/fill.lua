-- Puts a value in place of the lease. KEYS: the cell. ARGV: the cell's first 20 bytes with its token, cell, milliseconds to keep it.
-- The lease's end is not asked: a token that is still there means that nothing happened to the key.
if redis.pcall('GETRANGE', KEYS[1], 0, 19) ~= ARGV[1] then
    return 0
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
