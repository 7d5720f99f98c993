-- Extends a lease. KEYS: the cell. ARGV: the cell's first 20 bytes with its token, milliseconds. Answers 0 where it is lost.
local key, ms = KEYS[1], tonumber(ARGV[2])
if redis.pcall('GETRANGE', key, 0, 19) ~= ARGV[1] then
    return 0
end
local time = redis.call('TIME')
redis.call('SETRANGE', key, 20, struct.pack('<I8', time[1] * 1000 + math.floor(time[2] / 1000) + ms))
local ttl = redis.call('PTTL', key)
if ttl >= 0 and ttl < 2 * ms then
    redis.call('PEXPIRE', key, 2 * ms)
end
return 1
